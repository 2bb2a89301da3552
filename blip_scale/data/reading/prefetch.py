"""Shards are fetched before the order comes to them, by a thread in every worker.

The threads of all workers and ranks walk the same order; each fetches the next shard that is not in
the cache and that no other is fetching, so together they share the work.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence

from blip_scale.data.loading.order import SampleOrder
from blip_scale.data.reading.stream_store import StreamStore

UNLIMITED_BYTES = 16 << 30
"""How far ahead a cache without a limit is filled."""
BLOCKS = 3
"""The block in use and two more, if the cache holds them."""
LIMIT_SHARE = 0.75  # of a limited cache; the rest is for shards that are still in use
POLL_S = 0.5  # between two looks at where reading is, and at shards that others are fetching


class Prefetcher:
    """Fetches the shards of the block in use and of those that follow, as far as the cache holds.

    Without a remote stream it does nothing. What it can't fetch it leaves to whoever needs the
    shard, who has patience and proper errors.
    """

    def __init__(self, stores: Sequence[StreamStore], order: SampleOrder):
        self._stores = stores
        self._order = copy.copy(order)  # it remembers the block that it was asked for last
        self._position = (0, 0)
        self._stop: threading.Event | None = None

    def advance(self, epoch: int, position: int) -> None:
        """Reading has come to `position` of `epoch`. The first call starts the thread."""
        self._position = (epoch, position)
        if self._stop is None and any(store.remote for store in self._stores):
            self._stop = threading.Event()
            threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()

    def close(self) -> None:
        """End the thread after the shard that it is fetching."""
        if self._stop is not None:
            self._stop.set()
        self._stop = None

    def _run(self, stop: threading.Event) -> None:
        block: tuple[int, int] | None = None
        missing: list[tuple[int, int]] = []
        while not stop.is_set():
            position = self._position
            if block != (block := self._order.block_of(*position)):
                missing = self._plan(*position)
            for stream, shard in missing.copy():
                if stop.is_set() or self._order.block_of(*self._position) != block:
                    break
                if self._stores[stream].prefetch(shard):
                    missing.remove((stream, shard))
            stop.wait(POLL_S)

    def _plan(self, epoch: int, position: int) -> list[tuple[int, int]]:
        """Stream and shard of what is read next, in this order, as far as the cache holds it."""
        cache = next(store.cache for store in self._stores if store.cache)
        limit = cache.limit_bytes
        left_bytes = UNLIMITED_BYTES if limit is None else LIMIT_SHARE * limit
        plan: dict[tuple[int, int], None] = {}
        for shards in itertools.islice(self._order.upcoming(epoch, position), BLOCKS):
            for stream, shard in shards:
                if (stream, shard) in plan or not self._stores[stream].remote:
                    continue
                left_bytes -= self._stores[stream].shard_bytes(shard)
                if left_bytes < 0:
                    return list(plan)
                plan[stream, shard] = None
        return list(plan)
