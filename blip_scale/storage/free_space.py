"""Sizes of files as texts, and how much a disk still takes."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from pathlib import Path

_UNITS = ("b", "kb", "mb", "gb", "tb", "pb", "eb", "zb", "yb")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def parse_bytes(size: str | int) -> int:
    """Bytes of a size such as `64mb`, `1.5gb` or `4096`; a kb is 1024 bytes.

    Raises:
        ValueError: the text is no size.
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
            f"{size!r} is no size: give a number of bytes, or one with {', '.join(_UNITS)}"
        ) from error
    return count


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room, or of quota."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def free_bytes(folder: Path) -> float:
    """Free bytes of a folder in which a file can be written; made, and removed again, if it was
    not there."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        new = [folder, *folder.parents]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
        free = float(shutil.disk_usage(folder).free)
        for made in new[: new.index(above)]:
            made.rmdir()
        return free
    except OSError as error:
        raise OSError(f"{folder} can't be written ({error.strerror}): give another") from error
