"""Held-out pairs for evaluation, read by index. Images are resized, never augmented.

Legend: H and W height and width of the image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from blip_scale.config.recipe import MAX_PIXELS, DataRecipe, StreamRecipe
from blip_scale.data.captions import Clean, clean_caption
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.pixels.transforms import EvalTransform
from blip_scale.data.reading.stream_store import CorruptSample
from blip_scale.data.reading.streams import open_stream
from blip_scale.data.shards import IMAGE_COLUMNS, roles_of

logger = logging.getLogger(__name__)


Sample = Mapping[str, Any]
"""Columns of `shards`: `id`, `captions`, `source`, the encoded images, and in some sets
`annotations`."""


class HeldoutPairs:
    """A held-out set: image i is `ids[i]` and `images([i])`, with texts `captions[i]`.

    Only captions and their annotations are kept in memory. If captions describe two images, index
    i stands for the pair.

    An image that can't be decoded is replaced by a grey one, which counts as a miss. It is added to
    `unreadable` and logged once, and evaluation continues.
    """

    def __init__(
        self,
        name: str,
        samples: Iterable[Sample],
        encoded: Callable[[int], Sample],
        image_size: int,
        clean: Callable[[str], str],
        max_pixels: int = MAX_PIXELS,
    ):
        """Read the texts of all samples.

        Args:
            name: name of the set.
            samples: all samples; only their texts are kept.
            encoded: function that returns sample i with its encoded images.
            image_size: side of the square input in pixels.
            clean: function that cleans a caption.
            max_pixels: maximum number of pixels of an image.
        """
        self._encoded = encoded
        self._transform = EvalTransform(image_size)
        self._max_pixels = max_pixels
        self.name = name
        self.unreadable: dict[str, str] = {}
        """Id of an image that can't be decoded -> reason."""
        self.ids: list[str] = []
        self.captions: list[list[str]] = []
        """Cleaned captions of each image."""
        self.annotations: list[list[dict[str, Any]]] = []
        """One annotation per caption of each image; empty if the set has none."""
        self.sources: list[str] = []
        for sample in samples:
            self.ids.append(sample["id"])
            self.captions.append([clean(caption) for caption in sample["captions"]])
            self.annotations.append(sample.get("annotations", [{}] * len(sample["captions"])))
            self.sources.append(sample["source"])

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, indices: Iterable[int]) -> Tensor:
        """Read images as uint8 [len(indices), 3, H, W], or pairs as [len(indices), 2, 3, H, W]."""
        return torch.stack([self._image(index) for index in indices])

    def _image(self, index: int) -> Tensor:
        sample = self._encoded(index)
        images = [self._pixels(index, sample[name]) for name in IMAGE_COLUMNS if name in sample]
        return images[0] if len(images) == 1 else torch.stack(images)

    def _pixels(self, index: int, encoded: bytes) -> Tensor:
        try:
            image = decode_image(encoded, upright=True, max_pixels=self._max_pixels)
            return self._transform(image)
        except CorruptSample as error:
            if self.ids[index] not in self.unreadable:
                logger.warning("held-out set %s: image %s: %s", self.name, self.ids[index], error)
            self.unreadable[self.ids[index]] = str(error)
            return torch.full(
                (3, self._transform.size, self._transform.size), 128, dtype=torch.uint8
            )


def with_roles(sample: Sample, shares: Mapping[str, float]) -> Sample:
    """Keep only the captions whose role is in `shares`; keep all if there is none."""
    kept = [number for number, role in enumerate(roles_of(sample)) if shares.get(role)]
    if not kept:
        return sample
    lists = [name for name in ("captions", "roles", "annotations") if name in sample]
    return {**sample, **{name: [sample[name][number] for number in kept] for name in lists}}


def heldout_pairs(
    stream: StreamRecipe,
    image_size: int,
    data: DataRecipe | None = None,
    max_images: int | None = None,
    clean: Clean = clean_caption,
    max_words: int = 30,
) -> HeldoutPairs:
    """Open a held-out set, or `max_images` evenly spaced images of it.

    Raises:
        FileNotFoundError: the set is missing (the message names `data.make_with`), or its remote
            still fails after `data.retry_s`.
    """
    data = data or DataRecipe()
    store = open_stream(stream, data.make_with, retry_s=data.retry_s)
    taken = min(store.samples, max_images or store.samples)
    places = store.places(i * store.samples // taken for i in range(taken))  # evenly spaced

    def read(index: int) -> Sample:
        return with_roles(store.read(*places[index]), store.caption_shares)

    def cleaned(text: str) -> str:
        return clean(text, max_words)

    return HeldoutPairs(
        store.name, map(read, range(taken)), read, image_size, cleaned, data.max_pixels
    )
