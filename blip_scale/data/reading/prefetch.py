"""Prefetch shards in a thread of every loader worker.

The threads of all workers and ranks follow the same order. Each fetches the next shard that is not
cached and that no other thread is fetching, so they share the work.
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
"""Maximum bytes to prefetch into a cache without a limit."""
BLOCKS = 3
"""Number of blocks to prefetch, the current one included, if they fit into the cache."""
LIMIT_SHARE = 0.75
"""Share of a limited cache to fill by prefetching. The rest is for shards still in use."""
POLL_S = 0.5
"""Seconds between two checks of the position and of shards that other threads are fetching."""


class Prefetcher:
    """Fetches the shards of the current and the next blocks, as far as they fit into the cache.

    Without a remote stream or overlay it does nothing. If a shard can't be fetched, the reader
    retries it and raises the error.
    """

    def __init__(self, stores: Sequence[StreamStore], order: SampleOrder):
        self._stores = stores
        self._order = copy.copy(order)  # a copy, because an order holds one current block
        self._position = (0, 0)
        self._stop: threading.Event | None = None

    def advance(self, epoch: int, position: int) -> None:
        """Set the reader's position. The first call starts the thread."""
        self._position = (epoch, position)
        if self._stop is None and any(store.caches for store in self._stores):
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()

    def close(self) -> None:
        """Stop the thread after the fetch in progress."""
        if self._stop is not None:
            self._stop.set()
        self._stop = None

    def _run(self, stop: threading.Event) -> None:
        """Make a plan for each block that the reader enters, and fetch its shards."""
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
        """List the (stream, shard) pairs to fetch next, as far as they fit into the cache.

        Update the time of last use of cached ones. Otherwise the shards fetched by this plan could
        evict them before they are read.
        """
        limit = next(cache.limit_bytes for store in self._stores for cache in store.caches)
        ahead_bytes = UNLIMITED_BYTES if limit is None else LIMIT_SHARE * limit
        upcoming = self._order.upcoming(epoch, position, by_use=False)
        blocks = list(itertools.islice(upcoming, BLOCKS))
        # Finding the order of first use takes milliseconds. It matters only at the start of a run.
        if not self._are_cached(blocks[0]).all():
            blocks[0] = next(self._order.upcoming(epoch, position))
        places = _distinct(np.concatenate(blocks))
        places = places[np.cumsum(self._bytes_to_fetch(places)) <= ahead_bytes]
        return [(stream, shard) for stream, shard in places[~self._are_cached(places)].tolist()]

    def _bytes_to_fetch(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes in the cache of each shard.

        Args:
            places: stream and number of each shard, [shards, 2].
        """
        sizes = np.zeros(len(places), np.int64)
        for stream, store in enumerate(self._stores):
            if store.caches:
                is_of_stream = places[:, 0] == stream
                sizes[is_of_stream] = store.fetched_bytes(places[is_of_stream, 1])
        return sizes

    def _are_cached(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each shard is local or cached.

        Args:
            places: stream and number of each shard, [shards, 2].
        """
        are_cached = np.ones(len(places), np.bool_)
        for stream, store in enumerate(self._stores):
            if store.caches:
                is_of_stream = places[:, 0] == stream
                are_cached[is_of_stream] = store.are_cached(places[is_of_stream, 1])
        return are_cached


def _distinct(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Remove repeated rows from [shards, 2], keeping the first of each."""
    _, firsts = np.unique(places[:, 0] << 32 | places[:, 1], return_index=True)
    return places[np.sort(firsts)]
