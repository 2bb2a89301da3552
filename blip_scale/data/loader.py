"""Training batches: any number of ranks and workers reads the same samples in the same global
order.

Legend: B pairs of a micro batch on one rank, T packed tokens, H and W the sides of the image.
"""

from __future__ import annotations

import io
import itertools
import logging
import signal
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip_scale.data.captions import clean_caption
from blip_scale.data.mixing import describe, samples_per_epoch
from blip_scale.data.order import SampleOrder, Slot, StreamShape
from blip_scale.data.prefetch import Prefetcher
from blip_scale.data.stores import CorruptSample, DamagedShard, StreamStore, open_streams
from blip_scale.data.tokenizer import pack_captions
from blip_scale.data.transforms import TrainTransform
from blip_scale.recipe import DataRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PREFETCHED_BATCHES = 4  # a worker
_DEATHS = 3  # of workers without a batch in between: then the run stops
_DAMAGED_SHARDS = 8  # in a row: then it is no accident, and the run stops

logger = logging.getLogger(__name__)


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
    streams: list[str]
    """Name of the stream that each pair is from."""
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
        sizes = [store.samples for store in stores]
        counts = samples_per_epoch(data, sizes)
        logger.info("an epoch of %d pairs: %s", sum(counts), describe(data, sizes, counts))
        shapes = [
            StreamShape(store.name, store.shard_samples, count)
            for store, count in zip(stores, counts, strict=True)
        ]
        order = SampleOrder(shapes, seed, data.shuffle_block)
        steps_per_epoch = order.samples_per_epoch // position.global_batch_size
        if not steps_per_epoch:
            raise ValueError(
                f"train.global_batch_size {position.global_batch_size} is larger than an epoch of "
                f"{order.samples_per_epoch} pairs: lower it or make an epoch longer"
            )
        self.samples_per_epoch = steps_per_epoch * position.global_batch_size
        """Samples of an epoch over all ranks, without the incomplete global batch."""
        self.steps_per_epoch = steps_per_epoch
        """Optimizer steps of an epoch."""
        self.stream_names = [shape.name for shape in shapes]
        self._identity = {
            "seed": seed,
            "global_batch_size": position.global_batch_size,
            "shuffle_block": data.shuffle_block,
            "streams": [[shape.name, shape.samples, shape.samples_per_epoch] for shape in shapes],
        }
        self._position = position
        self._workers = data.workers
        self._samples_seen = 0
        self._iterator: Iterator[Batch | Exception] | None = None
        self._processes: list[BaseProcess] = []
        self._generation = 0
        self._batches = _MicroBatches(
            stores=stores,
            order=order,
            prefetcher=Prefetcher(stores, order),
            transform=TrainTransform(image_size, data.min_crop_scale, data.flip, data.augment),
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
        self._start()
        self._generation += 1
        return self._consume(self._generation)

    def _start(self) -> None:
        """Begin reading at the current position, with workers of its own."""
        first = self._samples_seen // self._position.micro_samples
        is_main_thread = threading.current_thread() is threading.main_thread()
        on_child_death = signal.getsignal(signal.SIGCHLD)
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
        self._processes = list(getattr(self._iterator, "_workers", []))
        if is_main_thread:  # torch would raise a worker's death in whatever the rank is doing
            signal.signal(signal.SIGCHLD, on_child_death)

    def _consume(self, generation: int) -> Iterator[Batch]:
        # No reference to the DataLoader's iterator is kept: close() must end its workers.
        while self._iterator is not None and self._generation == generation:
            batch = self._next()
            if isinstance(batch, Exception):
                self.close()
                raise batch
            self._samples_seen += self._position.micro_samples
            yield batch

    def _next(self) -> Batch | Exception:
        """The next batch; workers that were killed are replaced, and nothing is lost by it."""
        for _ in range(_DEATHS):
            assert self._iterator is not None
            try:
                return next(self._iterator)
            except Exception:  # RuntimeError, or what a torn message makes of itself
                dead = [process for process in self._processes if not process.is_alive()]
                if not dead:
                    raise
                died = ", ".join(
                    f"pid {process.pid}: exit code {process.exitcode}" for process in dead
                )
            logger.warning("a loader worker died (%s), all are started again", died)
            self.close()
            self._start()
        raise RuntimeError(
            f"loader workers die again and again ({died}). If nobody kills them, they may lack "
            "memory: lower data.workers"
        )

    def shares(self, batch: Batch) -> list[float]:
        """Share of every stream of `stream_names` in a batch."""
        return [batch.streams.count(name) / len(batch.streams) for name in self.stream_names]

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
        self._batches.prefetcher.close()
        for process in self._processes:
            if process.is_alive():  # it waits for a remote and hears nothing else
                process.kill()
        self._processes = []


@dataclass
class _MicroBatches(Dataset["Batch | Exception"]):
    """Micro batches of one rank by number; lives in the workers."""

    stores: list[StreamStore]
    order: SampleOrder
    prefetcher: Prefetcher
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
        self.prefetcher.advance(epoch, begin)
        samples: list[dict[str, Any]] = []
        captions: list[str] = []
        streams: list[str] = []
        images: list[Tensor] = []
        skipped: list[str] = []
        for place in range(begin, begin + self.position.micro_batch_size):
            slot = self.order.locate(epoch, place)
            sample, image = read_or_replace(self.stores[slot.stream], slot, skipped)
            samples.append(sample)
            streams.append(self.stores[slot.stream].name)
            captions.append(clean_caption(self._draw(sample, slot), self.text.max_words))
            images.append(self.transform(image, np.random.default_rng((self.seed, epoch, place))))
        packed = pack_captions(self.text.tokenizer, captions, self.text.max_tokens)
        return Batch(
            images=torch.stack(images),
            token_ids=packed.token_ids,
            offsets=packed.offsets,
            max_length=packed.max_length,
            ids=[sample["id"] for sample in samples],
            captions=captions,
            sources=[sample["source"] for sample in samples],
            streams=streams,
            skipped=skipped,
        )

    def _draw(self, sample: dict[str, Any], slot: Slot) -> str:
        """One of the captions: a random one at first, in each later pass the next."""
        captions: list[str] = sample["captions"]
        first = zlib.crc32(f"{self.seed}/{sample['id']}".encode())
        return captions[(first + slot.passing) % len(captions)]


def _leave_signals_to_the_rank(worker: int) -> None:
    """A launcher's SIGTERM or a Ctrl-C reaches workers too; the rank still needs their batches to
    stop cleanly.

    A worker ends when its rank does.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def read_or_replace(
    store: StreamStore, slot: Slot, skipped: list[str]
) -> tuple[dict[str, Any], Image.Image]:
    """The sample at `slot` and its RGB image; the next one of its shard that is whole, if it is
    corrupt; one of the next shard, if the shard is damaged.

    What is passed over is added to `skipped`. Raises ValueError when the shard has no whole sample,
    and when the shards that follow are damaged too.
    """
    filled = [shard for shard, count in enumerate(store.shard_samples) if count]
    start = filled.index(slot.shard)
    for shard in (filled + filled)[start : start + min(len(filled), _DAMAGED_SHARDS)]:
        count = store.shard_samples[shard]
        for step in range(count):
            index = (slot.sample + step) % count
            name = f"{store.name}/{store.shard_name(shard)}[{index}]"
            try:
                sample = store.read(shard, index)
                name += f" {sample['id']}"
                return sample, decode_image(sample["image"])
            except DamagedShard as error:
                skipped.append(str(error))
                break
            except CorruptSample as error:
                skipped.append(f"{name}: {error}")
        else:
            path = store.folder / store.shard_name(shard)
            raise ValueError(
                f"stream {store.name!r}: no sample of shard {path} can be decoded; make it again"
            )
    raise ValueError(f"stream {store.name!r}: too many damaged shards in a row, last {skipped[-1]}")


def decode_image(encoded: bytes) -> Image.Image:
    """RGB pixels of an encoded image; raises CorruptSample for what can't be decoded."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # every format's decoder has its own ways to fail
        raise CorruptSample(f"{type(error).__name__}: {error}") from error
