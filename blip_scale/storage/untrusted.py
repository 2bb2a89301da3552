"""Checks of untrusted input: names and paths in data sets, lists and checkpoints; folders in /tmp.

Such input was not written by the user who runs the command. A name becomes a file in an output
folder or a key in a bucket, so it must stay inside. A path in a list must be below the folder that
the user gave for the images.
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
"""Maximum length of a file name in bytes on Linux file systems."""


def private_folder(path: Path) -> Path:
    """Create a folder that only this user can read and write, or check an existing one.

    Use it for names in /tmp, which another user could have created.

    Raises:
        OSError: the path belongs to another user, is a link, or is not a folder.
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
    """Parse JSON. Raise ValueError for all invalid texts, also for those nested too deeply."""
    try:
        return json.loads(text, object_hook=object_hook)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


class RefusedPath(ValueError):
    """A path in a list must not be opened."""


def relative_name(name: str) -> str:
    """Check a file name relative to a folder, such as `a.mds` or `0/a.mds`, and return it.

    Raises:
        ValueError: the name may be outside of the folder, is too long, or has a backslash or an
            unprintable character.
    """
    parts = name.split("/")
    is_inside = not {"", ".", ".."} & set(parts)
    is_short = all(len(part.encode("utf-8", "replace")) <= _LONGEST_NAME for part in parts)
    if not (is_inside and is_short and name.isprintable()) or "\\" in name:
        raise ValueError(f"the file name {name[:200]!r} is not a relative path below its folder")
    return name


def below(folder: str, location: str) -> str:
    """Check that a location is below a folder, with links resolved, and return it.

    A URL is accepted only if the folder is on the same web server. A list must not make this
    machine contact other servers.

    Raises:
        RefusedPath: the location is outside of the folder, or is not a valid file name.
    """
    if is_web(location) and not is_web(folder):
        raise RefusedPath(f"{location} is a URL, which is not fetched")
    try:
        os.fsencode(location)
        is_file_name = "\0" not in location
    except UnicodeEncodeError:  # a lone surrogate
        is_file_name = False
    if not is_file_name:
        raise RefusedPath(f"{location!r} is not a file name")
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
    """Resolve links like os.path.realpath, but cache the result for each folder."""
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.islink(path):  # noqa: PTH114  false, not an error
        return os.path.realpath(path)
    return f"{_real_folder(folder)}/{name}"


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
