"""Parse file sizes such as `64mb`, and measure the free space of a disk."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from pathlib import Path

_UNITS = ("b", "kb", "mb", "gb", "tb", "pb", "eb", "zb", "yb")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def parse_bytes(size: str | int) -> int:
    """Number of bytes in a size such as `64mb`, `1.5gb` or `4096`. One kb is 1024 bytes.

    Raises:
        ValueError: the text is not a size.
    """
    if isinstance(size, int):
        return size
    text = size.lower().strip()
    try:
        if match := re.fullmatch(r"(.+)([kmgtpezy]b)", text):
            count = int(float(match[1]) * 1024 ** _UNITS.index(match[2]))
        else:
            count = int(text.removesuffix("b"))
        if count < 0:
            raise ValueError("negative")
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{size!r} is not a size: give a number of bytes, or a number with one of the units "
            f"{', '.join(_UNITS)}"
        ) from error
    return count


def is_disk_full(error: BaseException) -> bool:
    """Return True if a write failed because the disk or the user's quota is full."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def free_bytes(folder: Path) -> float:
    """Free bytes of a folder, checked by writing a file into it.

    A missing folder is created for the check and removed afterwards.

    Raises:
        OSError: the folder cannot be created or written.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        levels = [folder, *folder.parents]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
        free = float(shutil.disk_usage(folder).free)
        for created in levels[: levels.index(existing)]:
            created.rmdir()
        return free
    except OSError as error:
        raise OSError(
            f"{folder} is not writable ({error.strerror}): choose another folder"
        ) from error
