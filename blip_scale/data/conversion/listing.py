"""List the files below a folder into a temporary file, so the listing needs no memory per file."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from blip_scale.data.conversion.pairs import START, Place
from blip_scale.data.conversion.spool import Spool
from blip_scale.storage.locations import Entry, is_local, read_folder
from blip_scale.storage.objects import folder_markers

_NUMBER_BITS = 6
"""Low bits of a code, for the item's number in its batch of up to 64 items."""
_RECENT = 8


class Listing:
    """Files below a folder or a bucket's prefix, in the order of `list_folder`.

    Each file has a code: an integer that increases in this order, and by which `entry` looks up
    the file.
    """

    def __init__(self, folder: str, files: Spool[Any]) -> None:
        """`files` holds name, size and version of each file in ascending order; see `of`."""
        self._folder, self._files = folder, files
        self._recent: dict[int, list[Any]] = {}
        """Recently read batches of files, by the offset of their first byte."""

    @classmethod
    def of(cls, location: str, scratch: str = "") -> Listing:
        """List a folder.

        Args:
            location: path or URL of the folder.
            scratch: folder for the temporary file; "" for the system's.

        Raises:
            FileNotFoundError: the folder does not exist.
            NotADirectoryError: the location is a file.
            OSError: the disk of `scratch` is full.
        """

        def write(entries: Iterator[Entry]) -> Spool[Any]:
            return Spool.of_sorted(((e.name, e.size, e.version) for e in entries), scratch)

        listing = cls(location.rstrip("/"), read_folder(location, write))
        return listing if is_local(location) else listing._without_folders(scratch)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, entry in self.items())

    def items(self, code: int = 0) -> Iterator[tuple[int, Entry]]:
        """Yield code and entry of each file, beginning at the file with this code."""
        start = Place(0, code >> _NUMBER_BITS, code & (1 << _NUMBER_BITS) - 1) if code else START
        for place, fields in self._files(start):
            yield place.offset << _NUMBER_BITS | place.number, self._entry(fields)

    def entry(self, code: int) -> Entry:
        """Return the entry of the file with this code."""
        offset = code >> _NUMBER_BITS
        if offset not in self._recent:
            if len(self._recent) == _RECENT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[offset] = self._files.batch(offset)
        return self._entry(self._recent[offset][code & (1 << _NUMBER_BITS) - 1])

    def __reduce__(self) -> tuple[Any, ...]:
        return Listing, (self._folder, self._files)

    def _entry(self, fields: tuple[str, int, str]) -> Entry:
        name, size, version = fields
        return Entry(name, f"{self._folder}/{name}", False, size, version)

    def _without_folders(self, scratch: str) -> Listing:
        """Drop the empty objects that some tools create to mark folders."""
        empty = (entry.name for entry in self if not entry.size)
        markers = folder_markers(empty, (entry.name for entry in self))
        if not markers:
            return self
        kept = (e for e in self if e.name not in markers)
        return Listing(self._folder, Spool.of(((e.name, e.size, e.version) for e in kept), scratch))


class FileIndex:
    """Index of the files of a listing by a key made from the name. Needs 16 bytes per file."""

    def __init__(self, listing: Listing, key_of: Callable[[str], str | None]) -> None:
        """Read the listing. Skip files for which `key_of` returns None."""
        self._listing, self._key_of = listing, key_of
        hashes, codes = bytearray(), array("q")
        for code, entry in listing.items():
            key = key_of(entry.name)
            if key is not None:
                hashes += _hash(key)
                codes.append(code)
        unsorted = np.frombuffer(hashes, np.uint64)
        order = np.argsort(unsorted, kind="stable")
        self._hashes = unsorted[order]
        self.codes = np.frombuffer(codes, np.int64)[order]
        """Code of the file at each position of the index."""

    def __len__(self) -> int:
        return len(self.codes)

    def positions(self, key: str) -> Iterator[int]:
        """Yield the index positions of the files with this key, in the order of the listing."""
        digest = np.frombuffer(_hash(key), np.uint64)[0]
        position = int(np.searchsorted(self._hashes, digest))
        while position < len(self) and self._hashes[position] == digest:
            if self._key_of(self._listing.entry(int(self.codes[position])).name) == key:
                yield position
            position += 1


def _hash(key: str) -> bytes:
    return xxhash.xxh3_64_digest(key.encode("utf-8", "surrogatepass"))
