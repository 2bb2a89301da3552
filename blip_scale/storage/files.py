"""Small files of a run: replaced whole, or grown line by line and cut back to a step; a disk that
fails does not stop a run."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

_STEP = re.compile(rb'\{"step": (\d{1,18})[,}]')
_UMASK = re.compile(r"^Umask:\s*([0-7]+)$", re.MULTILINE)


class Spared(AbstractContextManager[None]):
    """Inside, a disk that fails costs what was to be written, and one warning until it works
    again."""

    def __init__(self, lost: str, on_failure: Callable[[], None] = lambda: None) -> None:
        """Args:
        lost: what the run does without, and where it would lie.
        on_failure: called after each failure.
        """
        self._lost, self._on_failure = lost, on_failure
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
                    "the disk takes no %s (%s); training goes on without, make room on the disk",
                    self._lost, error,
                )  # fmt: skip
            self._failed = True
            self._on_failure()
            return True
        self._failed = self._failed and error is not None
        return False


def follow_umask(path: Path) -> None:
    """Give a new file or folder the mode that `open` or `mkdir` would have given it.

    Some libraries create files as 0600 and folders as 0700 whatever the umask says (safetensors,
    Python's tempfile), and nobody else could read them.
    """
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    """The umask of this process. Asking `os.umask` would change it for all threads."""
    try:
        match = _UMASK.search(Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        match = None
    if match:
        return int(match[1], 8)
    umask = os.umask(0o077)  # no /proc: set and restored, which other threads may see
    os.umask(umask)
    return umask


def write_whole(file: Path, text: str, through: bool = True) -> None:
    """Replace a file in one step; with `through`, its text is on the disk before.

    Raises:
        OSError: the disk does not take it; the file is as it was.
    """
    draft = file.with_name(file.name + ".partial")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if through:
            os.fsync(stream.fileno())
    draft.replace(file)


def add_line(file: Path, step: int, entry: Mapping[str, Any]) -> None:
    """Append one JSON object that begins with its step.

    Raises:
        OSError: the disk does not take it.
    """
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": step, **entry}) + "\n")


def take_back(file: Path, last_step: int) -> None:
    """Cut a file that `add_line` made after a step; a last line torn by a kill goes as well.

    Raises:
        OSError: the disk does not take it.
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
