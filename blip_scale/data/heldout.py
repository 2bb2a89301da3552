"""Held-out pairs for evaluation: by index, resized only, never augmented.

Legend: S sequences, T packed tokens, H and W the sides of the image.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from blip_scale.data.captions import clean_caption
from blip_scale.data.decoding import decode_image
from blip_scale.data.stores import CorruptSample, StreamStore
from blip_scale.data.transforms import EvalTransform
from blip_scale.recipe import StreamRecipe

logger = logging.getLogger(__name__)


class HeldoutPairs:
    """Pair i is `ids[i]`, `captions[i]` (cleaned) and `images([i])`; nothing but captions is held
    in memory.

    An image that can't be decoded is grey, so that it counts as a miss, and is named in
    `unreadable` and once in the log; evaluation goes on.
    """

    def __init__(self, store: StreamStore, image_size: int, max_pairs: int | None = None):
        starts = [0, *accumulate(store.shard_samples)]
        places = [
            (s, i - starts[s])
            for s in range(len(starts) - 1)
            for i in range(starts[s], starts[s + 1])
        ]
        taken = min(len(places), max_pairs or len(places))
        self._places = [
            places[i * len(places) // taken] for i in range(taken)
        ]  # evenly over the set
        self._store = store
        self._transform = EvalTransform(image_size)
        self.name = store.name
        self.unreadable: dict[str, str] = {}
        """Reason by id."""
        samples = [store.read(*place) for place in self._places]
        self.ids: list[str] = [sample["id"] for sample in samples]
        self.captions: list[str] = [clean_caption(sample["captions"][0]) for sample in samples]
        self.sources: list[str] = [sample["source"] for sample in samples]

    def __len__(self) -> int:
        return len(self._places)

    def images(self, indices: Iterable[int]) -> Tensor:
        """Images of some pairs, uint8 [len(indices), 3, H, W]."""
        return torch.stack([self._image(index) for index in indices])

    def _image(self, index: int) -> Tensor:
        try:
            return self._transform(decode_image(self._store.read(*self._places[index])["image"]))
        except CorruptSample as error:
            if self.ids[index] not in self.unreadable:
                logger.warning("held-out set %s: image %s: %s", self.name, self.ids[index], error)
            self.unreadable[self.ids[index]] = str(error)
            return torch.full(
                (3, self._transform.size, self._transform.size), 128, dtype=torch.uint8
            )


def heldout_pairs(
    stream: StreamRecipe, image_size: int, make_with: str = "", max_pairs: int | None = None
) -> HeldoutPairs:
    """Open a held-out set; of more than `max_pairs` pairs so many are taken, evenly spread.

    Raises FileNotFoundError, naming `make_with`, where the set is missing.
    """
    return HeldoutPairs(StreamStore(stream, make_with), image_size, max_pairs)
