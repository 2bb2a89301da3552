"""Copy a list to a temporary file that can be read from any item.

Used for lists whose own file can be read only from its start.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import pickle
import struct
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from blip_scale.data.conversion.pairs import Place, RawPair
from blip_scale.data.reading.shared_arrays import file_of
from blip_scale.storage.free_space import is_disk_full

_BATCH = 64  # items compressed together
_BATCH_BYTES = 1 << 20  # image bytes after which a batch ends early
_LENGTH = struct.Struct("<Q")
_RUN = 1024 * _BATCH  # items sorted in memory at a time

T = TypeVar("T")


class Spool(Generic[T]):
    """Compressed items of a list in an unnamed temporary file.

    The file is removed when this object is deleted or its process ends, even by a kill. An
    unpickled spool opens the file of the process that wrote it.
    """

    def __init__(self, process: int, descriptor: int, inode: int) -> None:
        """Refer to an open file of a process."""
        self._process, self._descriptor, self._inode = process, descriptor, inode
        self._starts = array("q")
        """First byte of every batch. Filled only in the object that wrote the file."""

    @classmethod
    def of(cls, items: Iterable[T], folder: str = "") -> Spool[T]:
        """Write the items to a file in `folder`; "" for the system's temporary folder.

        Raises:
            OSError: the disk is full.
        """
        folder = folder or tempfile.gettempdir()
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  stays open
        spool = cls(os.getpid(), file.fileno(), os.fstat(file.fileno()).st_ino)
        weakref.finalize(spool, file.close)
        count = size = 0
        for batch in _batches(items):
            spool._starts.append(size)
            content = zlib.compress(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL), level=1)
            try:
                size += file.write(_LENGTH.pack(len(content)) + content)
                file.flush()
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.close()  # fails again, because it flushes the buffer
                if not is_disk_full(error):
                    raise
                full = OSError(
                    f"{folder} is full after {count} items of a list ({size / 1e6:.0f} MB): name a "
                    "folder on a larger disk with --scratch"
                )
                full.errno = error.errno  # tells callers that a retry is useless
                raise full from error
            count += len(batch)
        return spool

    @classmethod
    def of_sorted(cls, items: Iterable[tuple[Any, ...]], folder: str = "") -> Spool[Any]:
        """Sort tuples and write them. Only `_RUN` tuples are sorted in memory at a time."""
        runs: Spool[Any] = Spool.of(_sorted_runs(items), folder)
        firsts = runs._starts[:: _RUN // _BATCH]
        if len(firsts) < 2:
            return runs
        return Spool.of(heapq.merge(*map(runs._run, firsts)), folder)

    def __call__(self, start: Place) -> Iterator[tuple[Place, T]]:
        """Yield the items with their places, beginning at `start`.

        Raises:
            OSError: the process that wrote the file has ended. The list itself is not damaged.
        """
        with self._open() as descriptor:
            offset, first = start.offset, start.number
            while content := _content(descriptor, offset):
                batch = _unpacked(content)
                for number in range(first, len(batch)):
                    yield Place(0, offset, number), batch[number]
                offset, first = offset + _LENGTH.size + len(content), 0

    def batch(self, offset: int) -> list[T]:
        """Return the batch that begins at a byte. Raises the same errors as `__call__`."""
        with self._open() as descriptor:
            return _unpacked(_content(descriptor, offset))

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        try:
            descriptor = file_of(self._process, self._descriptor, os.O_RDONLY, "list")
        except RuntimeError as error:
            raise OSError(str(error)) from error
        try:
            if os.fstat(descriptor).st_ino != self._inode:
                raise OSError(f"process {self._process} no longer shares its list")
            yield descriptor
        finally:
            os.close(descriptor)

    def _run(self, offset: int) -> Iterator[T]:
        """Yield up to `_RUN` items, beginning at a byte.

        All runs share one descriptor, because there may be more runs than a process may open files.
        """
        for _ in range(_RUN // _BATCH):
            content = _content(self._descriptor, offset)
            if not content:
                return
            yield from _unpacked(content)
            offset += _LENGTH.size + len(content)

    def __reduce__(self) -> tuple[type[Spool[T]], tuple[int, int, int]]:
        return Spool, (self._process, self._descriptor, self._inode)


def _content(descriptor: int, offset: int) -> bytes:
    """Return a compressed batch, or b"" at the end of the file."""
    header = os.pread(descriptor, _LENGTH.size, offset)
    if not header:
        return b""
    (length,) = _LENGTH.unpack(header)
    return os.pread(descriptor, length, offset + _LENGTH.size)


def _unpacked(content: bytes) -> list[Any]:
    batch: list[Any] = pickle.loads(zlib.decompress(content))
    return batch


def _sorted_runs(items: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    rest = iter(items)
    while run := sorted(islice(rest, _RUN)):
        yield from run


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    batch: list[T] = []
    image_bytes = 0
    for item in items:
        batch.append(item)
        if isinstance(item, RawPair) and isinstance(item.image, bytes):
            image_bytes += len(item.image)
        if len(batch) == _BATCH or image_bytes > _BATCH_BYTES:
            yield batch
            batch, image_bytes = [], 0
    if batch:
        yield batch
