"""The files below a folder, in a temporary file: a listing takes no memory for each of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from blip_scale.data.conversion.pairs import START, Place
from blip_scale.data.conversion.spool import Spool
from blip_scale.storage.locations import Entry, is_local, read_folder

_NUMBER_BITS = 6
"""Bits of a place's code that hold the number in its batch, which has up to 64 items."""
_RECENT = 8


class Listing:
    """The files below a folder or a bucket's prefix, as `list_folder` lists them, in its order.

    The code of a file is a number that grows in this order, by which the file is found again.
    """

    def __init__(self, folder: str, files: Spool[Any]) -> None:
        """`files`: name, size and version of each file, ascending; see `of`."""
        self._folder, self._files = folder, files
        self._recent: dict[int, list[Any]] = {}
        """Batches of files that were found by their codes, by their first byte."""

    @classmethod
    def of(cls, location: str, scratch: str = "") -> Listing:
        """List a folder.

        Args:
            location: path or URL of the folder.
            scratch: folder for the temporary file; "": the system's.

        Raises:
            FileNotFoundError: there is no such folder.
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
        """Code and entry of the files from one of them on."""
        start = Place(0, code >> _NUMBER_BITS, code & (1 << _NUMBER_BITS) - 1) if code else START
        for place, fields in self._files(start):
            yield place.offset << _NUMBER_BITS | place.number, self._entry(fields)

    def entry(self, code: int) -> Entry:
        """The entry of a file."""
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
        """Drop the empty objects with which some tools mark folders."""
        markers = {entry.name for entry in self if not entry.size}
        if not markers:
            return self
        parents: set[str] = set()
        for entry in self:
            folder = entry.name.rpartition("/")[0]
            while folder and folder not in parents:
                if folder in markers:
                    parents.add(folder)
                folder = folder.rpartition("/")[0]
        if not parents:
            return self
        kept = (e for e in self if e.size or e.name not in parents)
        return Listing(self._folder, Spool.of(((e.name, e.size, e.version) for e in kept), scratch))


class FileIndex:
    """Files of a listing by a text made of their names, in 16 bytes each."""

    def __init__(self, listing: Listing, key_of: Callable[[str], str | None]) -> None:
        """Read the listing; files for which `key_of` gives None are left out."""
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
        """Codes of the files by position."""

    def __len__(self) -> int:
        return len(self.codes)

    def positions(self, key: str) -> Iterator[int]:
        """Positions of the files with a key, in the order of the listing."""
        digest = np.frombuffer(_hash(key), np.uint64)[0]
        position = int(np.searchsorted(self._hashes, digest))
        while position < len(self) and self._hashes[position] == digest:
            if self._key_of(self._listing.entry(int(self.codes[position])).name) == key:
                yield position
            position += 1


def _hash(key: str) -> bytes:
    return xxhash.xxh3_64_digest(key.encode("utf-8", "surrogatepass"))
