"""What tells that the input of a conversion is another one than before.

Lists and tables count with their content; files with size and time of the last write, in a bucket
with size and ETag. Images on web servers count with their address alone.
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

    Nothing is asked about images outside the folder `images_below`, which are not opened either.
    """

    def __init__(self, images_below: str | None = None) -> None:
        self._images_below = images_below
        self._folders: dict[str, dict[str, str]] = {}

    def of(self, pairs: Iterable[Found]) -> str:
        """Fingerprint of pairs in this order."""
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
        """The state of an image file; "" for one that is not there or can't be asked for."""
        if is_web(location):
            return ""
        if is_local(location):
            try:
                return file_version(location)
            except (OSError, ValueError):  # not there, or no name of a file
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
