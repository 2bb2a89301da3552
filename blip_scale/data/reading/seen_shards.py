"""When each shard was last seen in its folder, noted by all loader workers of a rank together.

The times lie in a memory file of the kernel, 4 bytes a shard. A worker opens it through the rank's
/proc entry, as `SharedArrays` does. Two workers that note a shard at once do no harm.
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
    """Time of the last look at each shard, in seconds of the machine's monotonic clock.

    Pickling sends a reference, which other processes of this machine can use while this one lives.
    """

    def __init__(self, shards: int, descriptor: int | None = None) -> None:
        """None was seen.

        Args:
            shards: their number.
            descriptor: an open file of another process; None creates one.
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
        """Note that a shard is there now."""
        self._times[number] = int(time.monotonic()) + 1

    def forget(self, number: int) -> None:
        """Note that a shard may be gone."""
        self._times[number] = 0

    def is_fresh(self, number: int, seconds: float) -> bool:
        """Whether a shard was seen in the last `seconds`."""
        seen_s = int(self._times[number]) - 1
        return seen_s >= 0 and time.monotonic() - seen_s < seconds

    def are_fresh(self, numbers: NDArray[np.int64], seconds: float) -> NDArray[np.bool_]:
        """`is_fresh` of many shards, [shards]."""
        seen_s = self._times[numbers].astype(np.int64) - 1
        return (seen_s >= 0) & (time.monotonic() - seen_s < seconds)


def _opened(shards: int, process: int, descriptor: int) -> SeenShards:
    """The notes of another process.

    Raises:
        RuntimeError: it has ended.
    """
    return SeenShards(shards, file_of(process, descriptor, os.O_RDWR, "notes"))
