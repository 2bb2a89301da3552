"""Cache of block layouts. One loader worker of a rank computes a layout, the others read it.

The cache is a memfd. Workers open it through the rank's /proc entry, like `SharedArrays`, so a
killed process leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip_scale.data.reading.shared_arrays import file_of

_SLOTS = 4
"""Number of layouts kept. Workers prefetch, so they may be in different blocks."""
_ROW_BYTES = 8
_EMPTY = -1


class BlockKey(NamedTuple):
    """Identity and size of a block."""

    epoch: int
    number: int
    """Index of the block in its epoch."""
    samples: int

    @property
    def header(self) -> bytes:
        """The key as bytes, which mark the slot of its layout."""
        return np.array(self, np.int64).tobytes()


class BlockLayouts:
    """Layouts of the most recently used blocks.

    Pickling sends a reference. Other processes on this machine can use it while this one is alive.
    """

    def __init__(self, largest: int, descriptor: int | None = None) -> None:
        """Create the memfd. It uses memory only as it is filled.

        Args:
            largest: number of samples of the largest block.
            descriptor: memfd of another process, opened here; None creates one.
        """
        if descriptor is None:
            descriptor = os.memfd_create("blip_scale_layouts", os.MFD_CLOEXEC)
            header = BlockKey(_EMPTY, 0, 0).header
            for slot in range(_SLOTS):
                os.pwrite(descriptor, header, slot * len(header))
        self._largest = largest
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._threads = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self._largest, os.getpid(), self._file.fileno())

    def get(
        self, block: BlockKey, rows: range, make: Callable[[], NDArray[np.int32]]
    ) -> NDArray[np.int32]:
        """Return a copy of some rows of a block's layout. If it is not cached, `make` computes it.

        Args:
            block: the block.
            rows: a contiguous range of rows.
            make: returns the layout, int32 [samples, 2].
        """
        slot, file = block.number % _SLOTS, self._file.fileno()
        header_at = slot * len(block.header)
        data_at = _SLOTS * len(block.header) + slot * _ROW_BYTES * self._largest
        with self._locked():
            if os.pread(file, len(block.header), header_at) == block.header:
                copy = np.empty((len(rows), 2), np.int32)
                _transfer(os.preadv, file, copy, data_at + rows.start * _ROW_BYTES)
                return copy
            layout = make()
            # Empty the slot first: a process may be killed before the layout is complete.
            os.pwrite(file, BlockKey(_EMPTY, 0, 0).header, header_at)
            _transfer(os.pwritev, file, layout, data_at)
            os.pwrite(file, block.header, header_at)
            return layout[rows.start : rows.stop]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Context manager that locks the file against other threads and processes."""
        with self._threads:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def _opened(largest: int, process: int, descriptor: int) -> BlockLayouts:
    """Open the layouts of another process.

    Raises:
        RuntimeError: the process has ended.
    """
    return BlockLayouts(largest, file_of(process, descriptor, os.O_RDWR, "layouts"))


def _transfer(
    action: Callable[[int, list[memoryview], int], int],
    file: int,
    rows: NDArray[np.int32],
    start: int,
) -> None:
    """Read or write all rows at offset `start`. One system call moves less than 2 GiB."""
    remaining = rows.data.cast("B")
    while remaining:
        moved = action(file, [remaining], start)
        remaining, start = remaining[moved:], start + moved
