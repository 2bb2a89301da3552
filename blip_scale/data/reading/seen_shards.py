"""Times at which shards were last seen in their folder, shared by the loader workers of a rank.

The times are in a memfd, with 4 bytes per shard. A worker opens it through the rank's /proc entry,
like `SharedArrays`. Concurrent writes for the same shard are harmless.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip_scale.data.reading.shared_arrays import file_of


class SeenShards:
    """Time at which each shard was last seen, in seconds of the monotonic clock.

    Pickling sends a reference. Other processes on this machine can use it while this one is alive.
    """

    def __init__(self, shards: int, descriptor: int | None = None) -> None:
        """Create the memfd, with no shard seen.

        Args:
            shards: number of shards.
            descriptor: memfd of another process, opened here; None creates one.
        """
        size = 4 * max(1, shards)
        if descriptor is None:
            descriptor = os.memfd_create("blip_scale_seen", os.MFD_CLOEXEC)
            os.truncate(descriptor, size)
        self._shards = shards
        self._file = os.fdopen(descriptor, "r+b")
        self._times = np.frombuffer(mmap.mmap(descriptor, size), np.uint32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self._shards, os.getpid(), self._file.fileno())

    def note(self, number: int) -> None:
        """Record that a shard was seen now."""
        self._times[number] = int(time.monotonic()) + 1

    def forget(self, number: int) -> None:
        """Record that a shard may be gone."""
        self._times[number] = 0

    def is_fresh(self, number: int, seconds: float) -> bool:
        """Return True if a shard was seen in the last `seconds`."""
        seen_s = int(self._times[number]) - 1
        return seen_s >= 0 and time.monotonic() - seen_s < seconds

    def are_fresh(self, numbers: NDArray[np.int64], seconds: float) -> NDArray[np.bool_]:
        """`is_fresh` of many shards, [shards]."""
        seen_s = self._times[numbers].astype(np.int64) - 1
        return (seen_s >= 0) & (time.monotonic() - seen_s < seconds)


def _opened(shards: int, process: int, descriptor: int) -> SeenShards:
    """Open the times of another process.

    Raises:
        RuntimeError: the process has ended.
    """
    return SeenShards(shards, file_of(process, descriptor, os.O_RDWR, "notes"))
