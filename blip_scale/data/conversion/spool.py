"""A temporary file with the items of a list that can't be read from any place on."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from blip_scale.data.conversion.pairs import Found, Place, RawPair
from blip_scale.data.reading.shared_arrays import file_of
from blip_scale.storage.free_space import is_disk_full

_BATCH = 64  # items that are compressed together
_BATCH_BYTES = 1 << 20  # of images in a batch
_LENGTH = struct.Struct("<Q")


class Spool:
    """Items of a list, compressed, in a file without a name.

    The file goes when this object or its process ends, however that happens. Pickled, the object
    opens the file of the process that wrote it.
    """

    def __init__(self, process: int, descriptor: int, inode: int) -> None:
        """Name the open file of a process."""
        self._process, self._descriptor, self._inode = process, descriptor, inode

    @classmethod
    def of(cls, items: Iterable[Found], folder: str = "") -> Spool:
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
            content = zlib.compress(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL), level=1)
            try:
                size += file.write(_LENGTH.pack(len(content)) + content)
                file.flush()
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.close()  # tries to write again
                if not is_disk_full(error):
                    raise
                raise OSError(
                    f"{folder} is full after {count} items of a list ({size / 1e6:.0f} MB): name a "
                    "folder on a larger disk with --scratch"
                ) from error
            count += len(batch)
        return spool

    def __call__(self, start: Place) -> Iterator[tuple[Place, Found]]:
        """Read the items from a place on.

        Raises:
            OSError: the process that wrote them has ended, which is no damage of the list.
        """
        try:
            descriptor = file_of(self._process, self._descriptor, os.O_RDONLY, "list")
        except RuntimeError as error:
            raise OSError(str(error)) from error
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_ino != self._inode:
                raise OSError(f"process {self._process} no longer shares its list")
            offset, first = start.offset, start.number
            file.seek(offset)
            while header := file.read(_LENGTH.size):
                (length,) = _LENGTH.unpack(header)
                batch = pickle.loads(zlib.decompress(file.read(length)))
                for number in range(first, len(batch)):
                    yield Place(0, offset, number), batch[number]
                offset, first = offset + _LENGTH.size + length, 0

    def __reduce__(self) -> tuple[type[Spool], tuple[int, int, int]]:
        return Spool, (self._process, self._descriptor, self._inode)


def _batches(items: Iterable[Found]) -> Iterator[list[Found]]:
    batch: list[Found] = []
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
