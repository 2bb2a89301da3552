"""Training batches: any number of ranks and workers reads the same samples in the same global
order.

Legend: B pairs of a micro batch on one rank, T packed tokens, H and W the sides of the image.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip_scale.data.captions import clean_caption
from blip_scale.data.order import SampleOrder, Slot, StreamShape
from blip_scale.data.stores import CorruptSample, StreamStore, open_streams
from blip_scale.data.tokenizer import pack_captions
from blip_scale.data.transforms import TrainTransform
from blip_scale.recipe import DataRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PREFETCHED_BATCHES = 4  # a worker


@dataclass(frozen=True)
class Batch:
    """One micro batch of one rank."""

    images: Tensor
    """[B, 3, H, W] uint8, not normalised."""
    token_ids: Tensor
    """[T] int64: [CLS] caption [SEP] of every pair, packed."""
    offsets: Tensor
    """[B+1] int32 into token_ids."""
    max_length: int
    """Tokens of the longest caption."""
    ids: list[str]
    captions: list[str]
    """Cleaned."""
    sources: list[str]
    skipped: list[str]
    """Place, id and reason of every corrupt sample that another one stands in for."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device` (asynchronously from pinned memory)."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            token_ids=self.token_ids.to(device, non_blocking=True),
            offsets=self.offsets.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader."""
        return replace(
            self,
            images=self.images.pin_memory(),
            token_ids=self.token_ids.pin_memory(),
            offsets=self.offsets.pin_memory(),
        )


@dataclass(frozen=True)
class CaptionInput:
    """How captions become tokens."""

    tokenizer: PreTrainedTokenizerFast
    max_tokens: int
    """[CLS] and [SEP] included; longer captions are cut."""
    max_words: int = 30


@dataclass(frozen=True)
class LoaderPosition:
    """This rank's share of every global batch."""

    rank: int
    world_size: int
    micro_batch_size: int
    """Pairs of one batch on one rank."""
    global_batch_size: int
    """Pairs of an optimizer step over all ranks and accumulation micro-steps."""

    def __post_init__(self) -> None:
        if self.global_batch_size % self.micro_samples:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} is no multiple of "
                f"{self.world_size} ranks x micro batch {self.micro_batch_size}: change one of them"
            )

    @property
    def micro_samples(self) -> int:
        """Pairs that all ranks together take in one micro-step."""
        return self.world_size * self.micro_batch_size


class TrainLoader:
    """Endless micro batches of this rank, epoch after epoch.

    The k-th micro-step of all ranks together takes the next `micro_samples` of the global order,
    rank after rank. An epoch holds whole global batches only; which few samples are left over
    changes from epoch to epoch. Augmentation depends on the seed, the epoch and the position in it
    alone. So batches are the same, bit for bit, for any number of workers and after any resume, and
    the union over the ranks is the same for any number of ranks.

    Raises FileNotFoundError or ValueError, naming stream, path and the command that makes the data,
    at the start or from the iterator.
    """

    def __init__(
        self,
        data: DataRecipe,
        image_size: int,
        text: CaptionInput,
        seed: int,
        position: LoaderPosition,
    ):
        stores = open_streams(data)
        shapes = [
            StreamShape(store.name, store.shard_samples, stream.repeat)
            for store, stream in zip(stores, data.streams, strict=True)
        ]
        order = SampleOrder(shapes, seed)
        steps_per_epoch = order.samples_per_epoch // position.global_batch_size
        if not steps_per_epoch:
            raise ValueError(
                f"train.global_batch_size {position.global_batch_size} is larger than an epoch of "
                f"{order.samples_per_epoch} pairs: lower it or raise `repeat` of a stream"
            )
        self.samples_per_epoch = steps_per_epoch * position.global_batch_size
        """Samples of an epoch over all ranks, without the incomplete global batch."""
        self.steps_per_epoch = steps_per_epoch
        """Optimizer steps of an epoch."""
        self._identity = {
            "seed": seed,
            "global_batch_size": position.global_batch_size,
            "streams": [[shape.name, shape.samples, shape.repeat] for shape in shapes],
        }
        self._position = position
        self._workers = data.workers
        self._samples_seen = 0
        self._iterator: Iterator[Batch | Exception] | None = None
        self._generation = 0
        self._batches = _MicroBatches(
            stores=stores,
            order=order,
            transform=TrainTransform(
                image_size, data.min_crop_scale, data.flip, data.augment, data.transform
            ),
            text=text,
            position=position,
            samples_per_epoch=self.samples_per_epoch,
            seed=seed,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, prefetched by the workers; only one iterator at a
        time.
        """
        self.close()
        micro_samples = self._position.micro_samples
        first = self._samples_seen // micro_samples
        self._iterator = iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=itertools.count(first),
                num_workers=self._workers,
                worker_init_fn=_leave_signals_to_the_rank,
                prefetch_factor=_PREFETCHED_BATCHES if self._workers else None,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else it draws from, and shifts, the global one
            )
        )
        self._generation += 1
        return self._consume(self._generation)

    def _consume(self, generation: int) -> Iterator[Batch]:
        # No reference to the DataLoader's iterator is kept: close() must end its workers.
        while self._iterator is not None and self._generation == generation:
            batch = next(self._iterator)
            if isinstance(batch, Exception):
                self.close()
                raise batch
            self._samples_seen += self._position.micro_samples
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the batch that was handed out last; the same on all ranks."""
        return {"samples_seen": self._samples_seen, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ranks may differ, the data may not."""
        for name, mine in self._identity.items():
            if state[name] != mine:
                raise ValueError(
                    f"the checkpoint was made with other data: {name} was {state[name]} and is "
                    f"{mine} now; restore it or start a new run in another output_dir"
                )
        if state["samples_seen"] % self._position.micro_samples:
            raise ValueError(
                f"the checkpoint lies at sample {state['samples_seen']}, inside a micro-step of "
                f"{self._position.micro_samples} samples: change train.micro_batch_size"
            )
        self.close()
        self._samples_seen = state["samples_seen"]

    def close(self) -> None:
        """End the workers; an iterator that is still held ends too."""
        self._iterator = None


@dataclass
class _MicroBatches(Dataset["Batch | Exception"]):
    """Micro batches of one rank by number; lives in the workers."""

    stores: list[StreamStore]
    order: SampleOrder
    transform: TrainTransform
    text: CaptionInput
    position: LoaderPosition
    samples_per_epoch: int
    seed: int

    def __getitem__(self, number: int) -> Batch | Exception:
        """An error is returned, not raised: torch would bury it in the worker's traceback."""
        try:
            return self._batch(number)
        except (OSError, ValueError) as error:
            return error

    def _batch(self, number: int) -> Batch:
        begin = (
            number * self.position.micro_samples
            + self.position.rank * self.position.micro_batch_size
        )
        epoch, begin = divmod(begin, self.samples_per_epoch)
        samples: list[dict[str, Any]] = []
        images: list[Tensor] = []
        skipped: list[str] = []
        for place in range(begin, begin + self.position.micro_batch_size):
            slot = self.order.locate(epoch, place)
            sample, image = read_or_replace(
                self.stores[slot.stream], slot, partial(self._pixels, epoch, place), skipped
            )
            samples.append(sample)
            images.append(image)
        captions = [clean_caption(sample["captions"][0], self.text.max_words) for sample in samples]
        packed = pack_captions(self.text.tokenizer, captions, self.text.max_tokens)
        return Batch(
            images=torch.stack(images),
            token_ids=packed.token_ids,
            offsets=packed.offsets,
            max_length=packed.max_length,
            ids=[sample["id"] for sample in samples],
            captions=captions,
            sources=[sample["source"] for sample in samples],
            skipped=skipped,
        )

    def _pixels(self, epoch: int, place: int, encoded: bytes) -> Tensor:
        return self.transform(encoded, np.random.default_rng((self.seed, epoch, place)))


def _leave_signals_to_the_rank(worker: int) -> None:
    """A launcher's SIGTERM or a Ctrl-C reaches workers too; the rank still needs their batches to
    stop cleanly.

    A worker ends when its rank does.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def read_or_replace(
    store: StreamStore, slot: Slot, decode: Callable[[bytes], Tensor], skipped: list[str]
) -> tuple[dict[str, Any], Tensor]:
    """The sample at `slot` and what `decode` makes of its image; the next one of its shard that is
    whole, if it is corrupt.

    What is passed over is added to `skipped`. Raises ValueError when the shard has no whole sample.
    """
    count = store.shard_samples[slot.shard]
    for step in range(count):
        index = (slot.sample + step) % count
        name = f"{store.name}/{store.shard_name(slot.shard)}[{index}]"
        try:
            sample = store.read(slot.shard, index)
            name += f" {sample['id']}"
            return sample, decode(sample["image"])
        except CorruptSample as error:
            skipped.append(f"{name}: {error}")
    path = store.folder / store.shard_name(slot.shard)
    raise ValueError(
        f"stream {store.name!r}: no sample of shard {path} can be decoded; make it again"
    )
