"""Training batches in one global order, independent of the number of ranks and workers."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from blip_scale.config.recipe import DataRecipe
from blip_scale.data.loading import workers
from blip_scale.data.loading.caption_mixture import CaptionMixture
from blip_scale.data.loading.course import CHANGEABLE, Course, Part
from blip_scale.data.loading.image_sizes import SizeSchedule
from blip_scale.data.loading.micro_batches import Batch, CaptionInput, LoaderPosition, MicroBatches
from blip_scale.data.loading.mixing import describe, samples_per_epoch
from blip_scale.data.loading.order import SampleOrder, StreamShape
from blip_scale.data.loading.shared_memory import (
    PREFETCHED_BATCHES,
    check_shared_memory,
    needed_bytes,
    ranks_here,
)
from blip_scale.data.pixels.transforms import TrainTransform
from blip_scale.data.reading.prefetch import Prefetcher
from blip_scale.data.reading.probe import unknown_share
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.reading.streams import open_streams
from blip_scale.data.tokenizer import MOST_UNKNOWN

_DEATH_SEEN_S = 30.0
"""Seconds to wait for the exit of a worker whose message was incomplete (busy machines)."""
_DEATHS = 3
"""Number of restarts of the workers without a batch after which the run stops."""

_STREAMS_DECIDE = (
    " (name, samples and samples per epoch of each stream determine the order; `local` and "
    "`remote` may change)"
)

logger = logging.getLogger(__name__)


class TrainLoader:
    """Endless micro batches of this rank, epoch after epoch.

    Each micro-step takes the next `micro_samples` samples of the global order and divides them
    among the ranks in order. An epoch holds whole global batches only. The few samples left over
    differ from epoch to epoch. Augmentation depends only on the seed, the epoch and the position in
    the epoch. Batches are therefore bit-identical for any number of workers and after a resume, and
    their union over the ranks is the same for any number of ranks.

    Each worker calls `set_up_worker` first. It is pickled, so it must be a module-level function.

    The constructor and the iterator raise FileNotFoundError or ValueError. The message names the
    stream, the path and the command that makes the data.
    """

    def __init__(
        self,
        data: DataRecipe,
        image_size: int,
        text: CaptionInput,
        seed: int,
        position: LoaderPosition,
        set_up_worker: Callable[[], object] | None = None,
    ):
        if data.workers:
            largest = max([image_size, *(stage.size for stage in data.image_sizes)])
            needed = needed_bytes(data.workers, position.micro_batch_size, largest)
            check_shared_memory(needed, ranks_here())
            workers.start_server()
        stores = open_streams(data)
        sizes = [int(store.shard_items.sum()) for store in stores]
        counts = samples_per_epoch(data, sizes)
        logger.info("an epoch of %d pairs: %s", sum(counts), describe(data, sizes, counts))
        _warn_of_small_cache(data, stores, counts)
        if position.rank == 0:
            _warn_of_unknown_tokens(stores, text)
        parts = [
            Part(store.name, size, count)
            for store, size, count in zip(stores, sizes, counts, strict=True)
        ]
        order = _order_of(parts, stores, seed, data.shuffle_block)
        steps_per_epoch = order.samples_per_epoch // position.global_batch_size
        if not steps_per_epoch:
            raise ValueError(
                f"train.global_batch_size {position.global_batch_size} is larger than an epoch of "
                f"{order.samples_per_epoch} pairs: lower it, or lengthen the epoch"
            )
        self.samples_per_epoch = steps_per_epoch * position.global_batch_size
        """Samples per epoch over all ranks, without the incomplete global batch."""
        self.steps_per_epoch = steps_per_epoch
        """Optimizer steps per epoch."""
        self.stream_names = [part.name for part in parts]
        self._identity: dict[str, Any] = {
            "seed": seed,
            "global_batch_size": position.global_batch_size,
            "shuffle_block": data.shuffle_block,
            "streams": [list(part[:3]) for part in parts],
        }
        self._position = position
        self._workers = data.workers
        self._set_up_worker = set_up_worker
        self._samples_seen = 0
        self._iterator: Iterator[Batch | Exception] | None = None
        self._processes: list[BaseProcess] = []
        self._generation = 0
        self._warned: set[str] = set()
        """Streams for which `_outside_mixture` has logged its warning."""
        self._batches = MicroBatches(
            stores=stores,
            order=order,
            prefetcher=Prefetcher(stores, order),
            transform=TrainTransform(
                image_size,
                data.min_crop_scale,
                data.flip,
                data.augment,
                data.transform,
                data.max_pixels,
            ),
            sizes=SizeSchedule.of(
                data.image_sizes, image_size, steps_per_epoch, position.global_batch_size
            ),
            text=text,
            position=position,
            course=Course.from_start(parts, position.global_batch_size),
            seed=seed,
            mixtures={
                store.name: CaptionMixture(store.caption_shares, seed, store.name)
                for store in stores
                if store.caption_shares
            },
        )

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over batches from the current position on. Only one iterator works at a time."""
        self.close()
        self._start()
        self._generation += 1
        return self._consume(self._generation)

    def _start(self) -> None:
        """Start workers that read from the current position on."""
        if self._workers:
            workers.start_server()  # no-op unless the server has died
        first = (self._samples_seen - self._course.seen) // self._position.micro_samples
        self._iterator = iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=itertools.count(first),
                num_workers=self._workers,
                multiprocessing_context=workers.CONTEXT if self._workers else None,
                worker_init_fn=partial(workers.begin, dict(os.environ), self._set_up_worker),
                prefetch_factor=PREFETCHED_BATCHES if self._workers else None,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # without it, the global generator would advance
            )
        )
        self._processes = list(getattr(self._iterator, "_workers", []))

    def _consume(self, generation: int) -> Iterator[Batch]:
        # Keep no reference to the DataLoader's iterator: close() must be able to end its workers.
        while self._iterator is not None and self._generation == generation:
            batch = self._next()
            if isinstance(batch, Exception):
                self.close()
                raise batch
            self._samples_seen += self._position.micro_samples
            yield batch

    def _next(self) -> Batch | Exception:
        """Return the next batch. If a worker dies, restart all workers without losing a sample."""
        for _ in range(_DEATHS):
            assert self._iterator is not None
            try:
                return next(self._iterator)
            except Exception:  # RuntimeError, or any error of unpickling an incomplete message
                ended = wait([process.sentinel for process in self._processes], _DEATH_SEEN_S)
                for process in self._processes:
                    if process.sentinel in ended:  # its sentinel is closed shortly before it exits
                        process.join(_DEATH_SEEN_S)
                dead = [process for process in self._processes if not process.is_alive()]
                if not dead:
                    raise
                died = ", ".join(f"pid {p.pid}: exit code {p.exitcode}" for p in dead)
            logger.warning("a loader worker died (%s); restarting all of them", died)
            self.close()
            self._start()
        raise RuntimeError(
            f"loader workers died {_DEATHS} times in a row ({died}). Unless something kills them, "
            "the machine or /dev/shm lacks memory: lower data.workers"
        )

    @property
    def stores(self) -> Sequence[StreamStore]:
        """Stores of the streams that are read."""
        return self._batches.stores

    def shares(self, batch: Batch) -> list[float]:
        """Share of each stream in a batch, in the order of `stream_names`."""
        return [batch.streams.count(name) / len(batch.streams) for name in self.stream_names]

    def caption_shares(self, batch: Batch) -> dict[str, float]:
        """Shares of a batch, by name of the metric.

        They are the shares of each stream and role of a mixture, of samples that lack a role of
        their mixture, of captions outside their mixture, and of truncated captions.
        """
        shares = {"data/share_cut_captions": batch.cut / len(batch.captions)}
        pairs = list(zip(batch.streams, batch.roles, strict=True))
        for store in self.stores:
            for role in store.caption_shares:
                count = pairs.count((store.name, role))
                shares[f"data/share_{store.name}_{role}"] = count / len(pairs)
        if len(shares) > 1:
            shares["data/share_lacking_role"] = batch.lacking / len(pairs)
            shares["data/share_outside_mixture"] = self._outside_mixture(pairs) / len(pairs)
        return shares

    def _outside_mixture(self, pairs: Sequence[tuple[str, str]]) -> int:
        """Count captions whose role is not in the mixture of their stream.

        Such a caption is used if its sample has no role of the mixture. The first one of each
        stream logs a warning.

        Args:
            pairs: stream and role of each caption.
        """
        count = 0
        for store in self.stores:
            mixed = [role for role, share in store.caption_shares.items() if share > 0]
            if not mixed:
                continue
            others = sum(name == store.name and role not in mixed for name, role in pairs)
            if others and store.name not in self._warned and self._position.rank == 0:
                self._warned.add(store.name)
                logger.warning(
                    "stream '%s' has samples without a caption of the roles %s; any of their "
                    "captions is used; data/share_outside_mixture counts them",
                    store.name, ", ".join(mixed),
                )  # fmt: skip
            count += others
        return count

    def state_dict(self) -> dict[str, Any]:
        """Position after the batch that was returned last; equal on all ranks."""
        course = {"course": self._course.to_json()} if self._course.seen else {}
        return {"samples_seen": self._samples_seen, **self._identity, **course}

    def load_state_dict(
        self, state: dict[str, Any], allowed_changes: Collection[str] = frozenset()
    ) -> None:
        """Resume from a `state_dict`. The number of ranks may differ.

        Args:
            state: result of `state_dict`.
            allowed_changes: settings of CHANGEABLE that may differ from the checkpoint.

        Raises:
            ValueError: the data differ in another setting, or the position is not a multiple of
                the samples of a micro-step.
        """
        changes = []
        for name, value in self._identity.items():
            if state[name] == value:
                continue
            change = f"{name} was {state[name]} and is {value} now"
            setting = CHANGEABLE.get(name)
            if setting not in allowed_changes:
                why = _STREAMS_DECIDE if name == "streams" else ""
                allow = f", allow it with --allow-change {setting}," if setting else ""
                raise ValueError(
                    f"the checkpoint was made with other data: {change}{why}; undo the change"
                    f"{allow} or start a new run in another output_dir"
                )
            changes.append(f"{setting}: {change}")
        seen, now = state["samples_seen"], self._course
        before = [Part(*part) for part in state["streams"]]
        course = Course.from_start(before, state["global_batch_size"])
        if "course" in state:
            course = Course.from_json(before, state["global_batch_size"], state["course"])
        if changes:
            course = course.changed(now.parts, now.global_batch_size, seen)
            logger.warning(
                "at sample %d: %s; %d samples of epoch %d follow in the old order, then epoch %d "
                "begins with the change",
                seen, "; ".join(changes), course.rest, course.epoch, course.epoch + 1,
            )  # fmt: skip
        if (seen - course.seen) % self._position.micro_samples:
            raise ValueError(
                f"the checkpoint lies at sample {seen}, inside a micro-step of "
                f"{self._position.micro_samples} samples: change train.micro_batch_size"
            )
        self.close()
        self._samples_seen = seen
        self._follow(course)

    @property
    def samples_seen(self) -> int:
        """Samples returned since the start of the run, over all ranks."""
        return self._samples_seen

    @property
    def scheduled_steps(self) -> int:
        """Number of completed steps of the schedule; see `Course.scheduled_steps`."""
        return self._course.scheduled_steps(self._samples_seen)

    @property
    def _course(self) -> Course:
        return self._batches.course

    def _follow(self, course: Course) -> None:
        """Switch to the order of `course`."""
        batches, stores = self._batches, {store.name: store for store in self.stores}
        seed, block = self._identity["seed"], self._identity["shuffle_block"]
        order = _order_of(course.parts, list(self.stores), seed, block)
        self._batches = replace(
            batches, course=course, order=order, prefetcher=Prefetcher(batches.stores, order)
        )
        if course.rest and course.former != course.parts:
            read = [stores[part.name] for part in course.former]
            former = _order_of(course.former, read, seed, block)
            self._batches.former = replace(
                self._batches, stores=read, order=former, prefetcher=Prefetcher(read, former)
            )

    def close(self) -> None:
        """Stop the workers and end the current iterator."""
        self._iterator = None
        for batches in (self._batches, self._batches.former):
            if batches is not None:
                batches.prefetcher.close()
        for process in self._processes:
            if process.is_alive():  # waiting for it could take as long as a remote does
                process.kill()
        self._processes = []


def _order_of(
    parts: Sequence[Part], stores: Sequence[StreamStore], seed: int, block_samples: int
) -> SampleOrder:
    shapes = [
        StreamShape(part.name, store.shared_items, part.samples_per_epoch, part.offset)
        for part, store in zip(parts, stores, strict=True)
    ]
    return SampleOrder(shapes, seed, block_samples)


def _warn_of_unknown_tokens(stores: Sequence[StreamStore], text: CaptionInput) -> None:
    """Warn if many tokens are [UNK], for example in a language unknown to the tokenizer."""
    for store in stores:
        share = unknown_share(store, text.tokenizer)
        if share > MOST_UNKNOWN:
            logger.warning(
                "stream %s: %.0f %% of the tokens of its first captions are [UNK]: set "
                "model.text.tokenizer to a tokenizer for this language",
                store.name, 100 * share,
            )  # fmt: skip


def _warn_of_small_cache(
    data: DataRecipe, stores: Sequence[StreamStore], counts: Sequence[int]
) -> None:
    """Warn if the cache is smaller than a block.

    Samples of a block are read in random order, so shards that don't fit are fetched repeatedly.
    """
    limit_bytes = next((store.cache.limit_bytes for store in stores if store.cache), None)
    epoch_bytes = sum(
        count / float(store.shard_items.sum()) * float(store.shards.raw_bytes.sum())
        for store, count in zip(stores, counts, strict=True)
        if store.remote
    )
    block_bytes = epoch_bytes * min(1.0, data.shuffle_block / sum(counts))
    if limit_bytes is not None and limit_bytes < block_bytes:
        logger.warning(
            "data.cache_limit is %.1f GB, but a shuffle block needs %.1f GB of shards: shards "
            "will be fetched repeatedly. Raise it, or lower data.shuffle_block (%d)",
            limit_bytes / 1e9, block_bytes / 1e9, data.shuffle_block,
        )  # fmt: skip
