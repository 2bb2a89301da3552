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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip_scale.data.reading.shared_arrays import file_of

_SLOTS = 4
"""Blocks that are kept. Workers are ahead of each other by the batches that they prefetch."""
_ROW_BYTES = 8
_EMPTY = -1


class BlockKey(NamedTuple):
    """A block, and its size."""

    epoch: int
    number: int
    """Number in the epoch."""
    samples: int

    @property
    def header(self) -> bytes:
        """Header in front of the layout."""
        return np.array(self, np.int64).tobytes()


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
        """A copy of some rows of a block's layout; `make` makes it where no process has.

        Args:
            block: the block.
            rows: the rows, in one piece.
            make: returns the layout, [samples, 2].
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
            # A process that is killed in between leaves an empty slot.
            os.pwrite(file, BlockKey(_EMPTY, 0, 0).header, header_at)
            _transfer(os.pwritev, file, layout, data_at)
            os.pwrite(file, block.header, header_at)
            return layout[rows.start : rows.stop]

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


def _transfer(
    action: Callable[[int, list[memoryview], int], int],
    file: int,
    rows: NDArray[np.int32],
    start: int,
) -> None:
    """Read or write all rows at a place of a file. One call of the kernel moves less than 2 GiB."""
    left = rows.data.cast("B")
    while left:
        moved = action(file, [left], start)
        left, start = left[moved:], start + moved
