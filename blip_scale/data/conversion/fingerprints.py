"""Fingerprints that change when the input of a conversion changes.

Lists and tables count by their content, local files by size and time of the last write, objects in
a bucket by size and ETag, images on web servers by their address alone.
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
    """Fingerprint of files as they were listed."""
    digest = xxhash.xxh3_64()
    for entry in entries:
        digest.update(_bytes(f"{entry.name}\n{entry.size} {entry.version}\n"))
    return digest.hexdigest()


class PairPrints:
    """Fingerprints of pairs out of a list, with the images that they name.

    Images outside the folder `images_below` are never opened, so they count by their path alone.
    """

    def __init__(self, images_below: str | None = None) -> None:
        """`images_below`: folder that images must lie below; None: anywhere."""
        self._images_below = images_below
        self._folders: dict[str, dict[str, str]] = {}

    def of(self, pairs: Iterable[Found]) -> str:
        """Fingerprint of pairs in their order."""
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
        """Size and time of an image file; "" where it is missing or lies on a web server."""
        if is_web(location):
            return ""
        if is_local(location):
            try:
                return file_version(location)
            except (OSError, ValueError):  # missing, or not a file name
                return ""
        folder = parent(location)
        if folder not in self._folders:  # one request for a thousand images
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
