"""Layouts of shuffled blocks, each made by one loader worker of a rank for all of them.

They lie in a memory file of the kernel. A worker opens it through the rank's /proc entry, as
`SharedArrays` does, so nothing is left behind by processes that are killed.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip_scale.data.reading.shared_arrays import file_of

_SLOTS = 4
"""Blocks that are kept. Workers are ahead of each other by the batches that they prefetch."""
_HEADER = np.dtype([("epoch", np.int64), ("block", np.int64), ("samples", np.int64)])
_EMPTY = -1
_MOST_SHARED = 1 << 27
"""Samples of the largest block that is shared: one call of the kernel moves less than 2 GiB."""


class BlockLayouts:
    """The layouts of the last blocks that were asked for, by epoch and number of the block.

    Pickling sends a reference, which other processes of this machine can use while this one lives.
    """

    def __init__(self, largest: int, descriptor: int | None = None) -> None:
        """Create the memory file, which takes memory as it is filled.

        Args:
            largest: samples of the largest block.
            descriptor: an open file of another process; None creates one.
        """
        if descriptor is None:
            descriptor = os.memfd_create("blip_scale_layouts", os.MFD_CLOEXEC)
            for slot in range(_SLOTS):
                os.pwrite(descriptor, _header(_EMPTY, 0, 0), slot * _HEADER.itemsize)
        self._largest = largest
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._threads = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self._largest, os.getpid(), self._file.fileno())

    def get(
        self, epoch: int, block: int, samples: int, make: Callable[[], NDArray[np.int32]]
    ) -> NDArray[np.int32]:
        """A copy of the layout of a block; `make` makes it where no process has.

        Args:
            epoch: epoch of the block.
            block: number in the epoch.
            samples: of the block.
            make: returns the layout, [2, samples].
        """
        if samples > _MOST_SHARED:
            return make()
        slot, file = block % _SLOTS, self._file.fileno()
        header_at = slot * _HEADER.itemsize
        data_at = _SLOTS * _HEADER.itemsize + slot * 8 * self._largest
        wanted = _header(epoch, block, samples)
        with self._locked():
            if os.pread(file, len(wanted), header_at) == wanted:
                data = os.pread(file, 8 * samples, data_at)
                return np.frombuffer(data, np.int32).reshape(2, samples)
            layout = make()
            # A process that is killed in between leaves an empty slot.
            os.pwrite(file, _header(_EMPTY, 0, 0), header_at)
            os.pwrite(file, layout.data, data_at)
            os.pwrite(file, wanted, header_at)
            return layout

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Inside, no other thread or process uses the file."""
        with self._threads:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def _opened(largest: int, process: int, descriptor: int) -> BlockLayouts:
    """The layouts of another process.

    Raises:
        RuntimeError: it has ended.
    """
    return BlockLayouts(largest, file_of(process, descriptor, os.O_RDWR, "layouts"))


def _header(epoch: int, block: int, samples: int) -> bytes:
    return np.array((epoch, block, samples), _HEADER).tobytes()
