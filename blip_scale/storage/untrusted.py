"""Names and paths that come from a data set, a list or a checkpoint: checked before they are used.

Who wrote them is not who runs the command. A name becomes a file in a folder of ours or a key of a
bucket, so it must not lead out of there; a path that a list names must lie below the folder that
the user gave for its images.
"""

from __future__ import annotations

import os
import urllib.parse
from functools import lru_cache
from pathlib import Path

from blip_scale.storage.locations import is_url, is_web, local_path

_LONGEST_NAME = 255
"""Bytes of a file name, on every file system that Linux mounts."""


class RefusedPath(ValueError):
    """A path from a list that is not opened."""


def plain_name(name: object, where: str) -> str:
    """The name of a file, without a folder.

    Args:
        name: as it was read.
        where: the file that holds it, for the error.

    Raises:
        ValueError: it is no text, names a folder, or holds what no file name of ours holds.
    """
    if isinstance(name, str) and "/" not in name:
        return relative_name(name, where)
    raise ValueError(f"{where}: {str(name)[:200]!r} is no name of a file in this folder")


def relative_name(name: str, where: str) -> str:
    """The name of a file in a folder or in folders below it: `a.mds`, `0/a.mds`.

    Raises:
        ValueError: it could lead out of the folder, or holds what no file name of ours holds.
    """
    parts = name.split("/")
    is_inside = not {"", ".", ".."} & set(parts)
    is_short = all(len(part.encode("utf-8", "replace")) <= _LONGEST_NAME for part in parts)
    if not (is_inside and is_short and name.isprintable()) or "\\" in name or is_url(name):
        raise ValueError(f"{where}: {name[:200]!r} is no name of a file in this folder")
    return name


def below(folder: str, location: str) -> str:
    """The location, where it lies below a folder with its links resolved.

    Locations on web servers lie below a folder only where the folder is on the same server: a list
    can't make this machine ask another one.

    Raises:
        RefusedPath: it lies elsewhere, or no file can have this name.
    """
    if is_web(location) and not is_web(folder):
        raise RefusedPath(f"{location} is a URL, which is not fetched")
    try:
        os.fsencode(location)
        is_file_name = "\0" not in location
    except UnicodeEncodeError:  # half a surrogate pair
        is_file_name = False
    if not is_file_name:
        raise RefusedPath(f"{location!r} is no name of a file")
    if not _is_below(folder, location):
        raise RefusedPath(f"{location} is not below {folder}")
    return location


def _is_below(folder: str, location: str) -> bool:
    if _is_remote(folder) or _is_remote(location):
        if is_web(location):
            location = urllib.parse.unquote(location)
        return location.startswith(f"{folder.rstrip('/')}/") and ".." not in location.split("/")
    root = _real_folder(str(local_path(folder)))
    return _real_path(str(local_path(location))).startswith(f"{root.rstrip('/')}/")


def _is_remote(location: str) -> bool:
    return is_url(location) and not location.startswith("file://")


def _real_path(path: str) -> str:
    """As os.path.realpath, with the folders of millions of images resolved once."""
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or Path(path).is_symlink():
        return os.path.realpath(path)
    return f"{_real_folder(folder)}/{name}"


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
