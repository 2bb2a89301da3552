"""A temporary file with the items of a list that can't be read from any place on."""

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

_BATCH = 64  # items that are compressed together
_BATCH_BYTES = 1 << 20  # of images in a batch
_LENGTH = struct.Struct("<Q")
_RUN = 1024 * _BATCH  # items that are sorted in memory

T = TypeVar("T")


class Spool(Generic[T]):
    """Items of a list, compressed, in a file without a name.

    The file goes when this object or its process ends, however that happens. Pickled, the object
    opens the file of the process that wrote it.
    """

    def __init__(self, process: int, descriptor: int, inode: int) -> None:
        """Name the open file of a process."""
        self._process, self._descriptor, self._inode = process, descriptor, inode
        self._starts = array("q")
        """First byte of every batch, in the object that wrote them."""

    @classmethod
    def of(cls, items: Iterable[T], folder: str = "") -> Spool[T]:
        """Write the items into a file in a folder; "": the system's folder for temporary files.

        Raises:
            OSError: the disk is full.
        """
        folder = folder or tempfile.gettempdir()
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it stays open
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
                    file.close()  # tries to write again
                if not is_disk_full(error):
                    raise
                full = OSError(
                    f"{folder} is full after {count} items of a list ({size / 1e6:.0f} MB): name a "
                    "folder on a larger disk with --scratch"
                )
                full.errno = error.errno  # by which it is known not to be worth a retry
                raise full from error
            count += len(batch)
        return spool

    @classmethod
    def of_sorted(cls, items: Iterable[tuple[Any, ...]], folder: str = "") -> Spool[Any]:
        """Write tuples in ascending order. `_RUN` of them are sorted in memory at a time."""
        runs: Spool[Any] = Spool.of(_sorted_runs(items), folder)
        firsts = runs._starts[:: _RUN // _BATCH]
        if len(firsts) < 2:
            return runs
        return Spool.of(heapq.merge(*map(runs._run, firsts)), folder)

    def __call__(self, start: Place) -> Iterator[tuple[Place, T]]:
        """Read the items from a place on.

        Raises:
            OSError: the process that wrote them has ended, which is no damage of the list.
        """
        with self._open() as descriptor:
            offset, first = start.offset, start.number
            while content := _content(descriptor, offset):
                batch = _unpacked(content)
                for number in range(first, len(batch)):
                    yield Place(0, offset, number), batch[number]
                offset, first = offset + _LENGTH.size + len(content), 0

    def batch(self, offset: int) -> list[T]:
        """The items that are compressed together from a byte on; raises as reading does."""
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
        """Read the `_RUN` items from a byte on. Runs share a descriptor, as there may be more of
        them than a process may open."""
        for _ in range(_RUN // _BATCH):
            content = _content(self._descriptor, offset)
            if not content:
                return
            yield from _unpacked(content)
            offset += _LENGTH.size + len(content)

    def __reduce__(self) -> tuple[type[Spool[T]], tuple[int, int, int]]:
        return Spool, (self._process, self._descriptor, self._inode)


def _content(descriptor: int, offset: int) -> bytes:
    """A compressed batch; b"" at the end of the file."""
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
