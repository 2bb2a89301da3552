"""Compute fingerprints that change when the input of a conversion changes.

- Lists and tables: content.
- Local files: size and modification time.
- Objects in a bucket: size and ETag.
- Images on web servers: URL only.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from blip_scale.data.conversion.pairs import Found, RawPair
from blip_scale.storage.locations import (
    Entry,
    basename,
    file_version,
    is_local,
    is_web,
    list_folder,
    parent,
)
from blip_scale.storage.untrusted import RefusedPath, below


def of_files(entries: Iterable[Entry]) -> str:
    """Return the fingerprint of listed files, from their names, sizes and versions."""
    digest = xxhash.xxh3_64()
    for entry in entries:
        digest.update(_bytes(f"{entry.name}\n{entry.size} {entry.version}\n"))
    return digest.hexdigest()


class PairPrints:
    """Fingerprints of pairs from a list and of the images that they name.

    Images outside the folder `images_below` are never opened, so only their paths are used.
    """

    def __init__(self, images_below: str | None = None) -> None:
        """Images must lie below the folder `images_below`; None allows any place."""
        self._images_below = images_below
        self._folders: dict[str, dict[str, str]] = {}

    def of(self, pairs: Iterable[Found]) -> str:
        """Return the fingerprint of a sequence of pairs."""
        digest = xxhash.xxh3_64()
        for pair in pairs:
            digest.update(_bytes(f"{pair!r}\n"))
            if isinstance(pair, RawPair):
                root = None if pair.from_folder else self._images_below
                for image in (pair.image, pair.second_image):
                    if isinstance(image, str) and _is_below(root, image):
                        digest.update(_bytes(f"{self._version(image)}\n"))
        return digest.hexdigest()

    def _version(self, location: str) -> str:
        """Return size and version of an image; "" if it is missing or on a web server."""
        if is_web(location):
            return ""
        if is_local(location):
            try:
                return file_version(location)
            except (OSError, ValueError):  # missing, or not a file name
                return ""
        folder = parent(location)
        if folder not in self._folders:  # a listing takes one request for a thousand images
            try:
                listed = list_folder(folder)
            except (FileNotFoundError, NotADirectoryError):
                listed = []
            self._folders[folder] = {e.name: f"{e.size} {e.version}" for e in listed}
        return self._folders[folder].get(basename(location), "")


def _is_below(folder: str | None, location: str) -> bool:
    try:
        return folder is None or bool(below(folder, location))
    except RefusedPath:
        return False


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
