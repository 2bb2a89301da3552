"""A thread in every worker fetches shards before they are read.

The threads of all workers and ranks walk the same order. Each fetches the next shard that is not
cached and that no other thread is fetching, so together they share the work.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blip_scale.data.loading.order import SampleOrder
from blip_scale.data.reading.stream_store import StreamStore

UNLIMITED_BYTES = 16 << 30
"""Bytes that are fetched ahead into a cache without a limit."""
BLOCKS = 3
"""Blocks that are fetched: the one in use and two more, if the cache holds them."""
LIMIT_SHARE = 0.75
"""Share of a limited cache that is filled ahead. The rest is for shards that are still in use."""
POLL_S = 0.5
"""Seconds between two looks at the position and at shards that other threads are fetching."""


class Prefetcher:
    """Fetches the shards of the block in use and of the next ones, as far as the cache holds them.

    Without a remote stream or overlay it does nothing. A shard that can't be fetched is left to
    the reader, which retries and raises errors.
    """

    def __init__(self, stores: Sequence[StreamStore], order: SampleOrder):
        self._stores = stores
        self._order = copy.copy(order)  # an order holds one block, and the reader's is another
        self._position = (0, 0)
        self._stop: threading.Event | None = None

    def advance(self, epoch: int, position: int) -> None:
        """Note that reading is at `position` of `epoch`. The first call starts the thread."""
        self._position = (epoch, position)
        if self._stop is None and any(store.caches for store in self._stores):
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()

    def close(self) -> None:
        """Stop the thread after the shard that it is fetching."""
        if self._stop is not None:
            self._stop.set()
        self._stop = None

    def _run(self, stop: threading.Event) -> None:
        """Make a plan in every block that the reader enters, and fetch what it misses."""
        planned_block: tuple[int, int] | None = None
        missing: list[tuple[int, int]] = []
        while not stop.is_set():
            position = self._position
            block = self._order.block_of(*position)
            if block != planned_block:
                planned_block, missing = block, self._plan(*position)
            for stream, shard in missing.copy():
                if stop.is_set() or self._order.block_of(*self._position) != block:
                    break
                if self._stores[stream].prefetch(shard):
                    missing.remove((stream, shard))
            stop.wait(POLL_S)

    def _plan(self, epoch: int, position: int) -> list[tuple[int, int]]:
        """Streams and shards that are read next and not cached, as far as the cache holds them.

        Those that are cached are marked as used. Otherwise the shards that this plan fetches could
        evict them before they are read.
        """
        limit = next(cache.limit_bytes for store in self._stores for cache in store.caches)
        ahead_bytes = UNLIMITED_BYTES if limit is None else LIMIT_SHARE * limit
        upcoming = self._order.upcoming(epoch, position, by_use=False)
        blocks = list(itertools.islice(upcoming, BLOCKS))
        # The order of first use takes milliseconds to find out. It matters at the start of a run.
        if not self._are_cached(blocks[0]).all():
            blocks[0] = next(self._order.upcoming(epoch, position))
        places = _distinct(np.concatenate(blocks))
        places = places[np.cumsum(self._bytes_to_fetch(places)) <= ahead_bytes]
        return [(stream, shard) for stream, shard in places[~self._are_cached(places)].tolist()]

    def _bytes_to_fetch(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes that shards, [shards, 2] by stream and number, take of the cache."""
        sizes = np.zeros(len(places), np.int64)
        for stream, store in enumerate(self._stores):
            if store.caches:
                is_of_stream = places[:, 0] == stream
                sizes[is_of_stream] = store.fetched_bytes(places[is_of_stream, 1])
        return sizes

    def _are_cached(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether shards, [shards, 2] by stream and number, need not be fetched."""
        are_cached = np.ones(len(places), np.bool_)
        for stream, store in enumerate(self._stores):
            if store.caches:
                is_of_stream = places[:, 0] == stream
                are_cached[is_of_stream] = store.are_cached(places[is_of_stream, 1])
        return are_cached


def _distinct(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Streams and shards, [shards, 2], each where it occurs first."""
    _, firsts = np.unique(places[:, 0] << 32 | places[:, 1], return_index=True)
    return places[np.sort(firsts)]
