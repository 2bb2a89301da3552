"""Names and paths that come from a data set, a list or a checkpoint: checked before they are used;
and folders in /tmp, where others may have been before.

Who wrote them is not who runs the command. A name becomes a file in a folder of ours or a key of a
bucket, so it must not lead out of there; a path that a list names must lie below the folder that
the user gave for its images.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import urllib.parse
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from blip_scale.storage.locations import is_url, is_web, local_path

_LONGEST_NAME = 255
"""Bytes of a file name, on every file system that Linux mounts."""


def private_folder(path: Path) -> Path:
    """A folder that nobody else can read or write, made where it is missing; for names in /tmp that
    another user could take first.

    Raises:
        OSError: it is another user's, a link, or no folder.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{path} is a link or a file, not a folder of this user: remove it")
    if status.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user: choose another folder (--scratch)")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def parse_json(
    text: str | bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """As json.loads; raises ValueError for every text that is not read, deeply nested ones too."""
    try:
        return json.loads(text, object_hook=object_hook)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


class RefusedPath(ValueError):
    """A path from a list that is not opened."""


def relative_name(name: str) -> str:
    """The name of a file in a folder or in folders below it: `a.mds`, `0/a.mds`.

    Raises:
        ValueError: it could lead out of the folder, or holds what no file name of ours holds.
    """
    parts = name.split("/")
    is_inside = not {"", ".", ".."} & set(parts)
    is_short = all(len(part.encode("utf-8", "replace")) <= _LONGEST_NAME for part in parts)
    if not (is_inside and is_short and name.isprintable()) or "\\" in name:
        raise ValueError(f"the file name {name[:200]!r} is no relative path below its folder")
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
    if name in ("", ".", "..") or os.path.islink(path):  # noqa: PTH114  false, not an error
        return os.path.realpath(path)
    return f"{_real_folder(folder)}/{name}"


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
