"""Small files of a run: atomic replacement, and JSON Lines that can be truncated to a step."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from blip_scale.storage.output_files import written_whole

logger = logging.getLogger(__name__)

_STEP = re.compile(rb'\{"step": (\d{1,18})[,}]')
_UMASK = re.compile(r"^Umask:\s*([0-7]+)$", re.MULTILINE)


class Spared(AbstractContextManager[None]):
    """Swallow OSError while writing an optional file.

    The context manager warns once, and again only after a write has succeeded in between.
    """

    def __init__(self, lost: str) -> None:
        """Describe the file.

        Args:
            lost: what is not written, for the warning, such as "heartbeat in FILE".
        """
        self._lost = lost
        self._failed = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if isinstance(error, OSError):
            if not self._failed:
                logger.warning(
                    "cannot write %s (%s); training continues without it; free some disk space",
                    self._lost, error,
                )  # fmt: skip
            self._failed = True
            return True
        self._failed = self._failed and error is not None
        return False


def follow_umask(path: Path) -> None:
    """Set the mode of a new file or folder according to the umask.

    Some libraries (safetensors, Python's tempfile) ignore the umask and create files as 0600 and
    folders as 0700, which other users can't read.
    """
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    """Umask of this process, from /proc: `os.umask` would change it for all threads."""
    try:
        match = _UMASK.search(Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        match = None
    if match:
        return int(match[1], 8)
    umask = os.umask(
        0o077
    )  # without /proc: set and restore it, although other threads may see the change
    os.umask(umask)
    return umask


def write_whole(file: Path, text: str, through: bool = True) -> None:
    """Replace a file atomically; see `written_whole`.

    Args:
        file: file to create or replace.
        text: new content.
        through: sync the content to the disk before the file is replaced.

    Raises:
        OSError: the write failed; the file is unchanged.
    """
    with written_whole(file) as place, place.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if through and place.is_file():  # no device
            os.fsync(stream.fileno())


def add_line(file: Path, step: int, entry: Mapping[str, Any]) -> None:
    """Append one JSON object whose first key is `step`.

    Raises:
        OSError: the write failed.
    """
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": step, **entry}) + "\n")


def has_line(file: Path, step: int, keys: Iterable[str]) -> bool:
    """Return True if a line written by `add_line` for `step` has all `keys`.

    Raises:
        OSError: the file cannot be read.
    """
    if not file.exists():
        return False
    wanted = {"step", *keys}
    with file.open("rb") as stream:
        for line in stream:
            number = _STEP.match(line)
            if number is None or int(number[1]) != step:
                continue
            with contextlib.suppress(ValueError):  # a line left incomplete by a kill
                if wanted <= json.loads(line).keys():
                    return True
    return False


def take_back(file: Path, last_step: int) -> None:
    """Truncate a file written by `add_line` after `last_step`.

    An incomplete last line, left by a kill, is removed as well.

    Raises:
        OSError: the file cannot be truncated.
    """
    if not file.exists():
        return
    keep = position = 0
    with file.open("rb") as stream:
        for line in stream:
            position += len(line)
            step = _STEP.match(line)
            if step is None or not line.endswith(b"}\n"):
                continue
            if int(step[1]) > last_step:
                break
            keep = position
    os.truncate(file, keep)
