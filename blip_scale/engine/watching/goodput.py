"""Goodput of a run: the share of its wall time that went into optimizer steps that count.

The clock starts with the run's first start and never stops: it includes the time in which no
process runs. `goodput.json` in the run's folder holds the record, which every start continues. The
checkpoints hold a copy for the case that the file is lost.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from blip_scale.storage import files, run_folder

logger = logging.getLogger(__name__)

Use = Literal["steps", "start", "evaluation", "saving", "repeated", "other"]
"""Use of wall time. `steps`: optimizer steps that count, each once. `start`: from the process to
its first step. `saving`: pauses for checkpoints and uploads. `repeated`: steps that changed
nothing, or whose result was lost in a failure. `other`: logs and reports."""
USES: tuple[Use, ...] = ("steps", "start", "evaluation", "saving", "repeated", "other")

_EVERY_S = 1.0
_FIRST_START = "first_start"


class Goodput:
    """Wall time of a run by its use; on ranks other than the main one every call does nothing.

    Each `spend` says how the time since the last one was used. Time that no process accounted for
    is `down`: queues, nodes that failed, and what a process did after its last `spend`.
    """

    def __init__(self, output_dir: Path, is_main: bool) -> None:
        """Continue the record of earlier starts. A file that can't be read is replaced.

        Args:
            output_dir: folder of the run.
            is_main: whether this rank keeps the record.
        """
        self._file = output_dir / run_folder.GOODPUT
        self._disk = files.Spared(f"goodput in {self._file}")
        self._is_main = is_main
        self._last = self._first_start = psutil.Process().create_time()
        self._seconds: dict[str, float] = dict.fromkeys(USES, 0.0)
        self._written = 0.0
        self._is_continued = is_main and self._file.exists() and self._read()

    def resume(self, saved: Mapping[str, float]) -> None:
        """Count the steps that the checkpoint holds, and no others.

        The file is written once a second, so the checkpoint may know more than it.

        Args:
            saved: `record` of the checkpoint that the run resumes from; empty without one.
        """
        if not self._is_main:
            return
        seconds: dict[str, float] = {use: saved.get(use, 0.0) for use in USES}
        if self._is_continued and sum(self._seconds.values()) >= sum(seconds.values()):
            kept_s = min(seconds["steps"], self._seconds["steps"])
            self._seconds["repeated"] += self._seconds["steps"] - kept_s
            self._seconds["steps"] = kept_s
        elif saved:
            self._first_start, self._seconds = saved[_FIRST_START], seconds

    def spend(self, use: Use) -> None:
        """Account for the time since the last call; write the file about once a second."""
        if not self._is_main:
            return
        now = time.time()
        self._seconds[use] += max(0.0, now - self._last)  # the clock may go backwards
        self._last = now
        if not 0 <= now - self._written < _EVERY_S:
            self._written = now
            with self._disk:
                content = {_FIRST_START: self._first_start, **self.figures()}
                files.write_whole(self._file, json.dumps(content) + "\n", through=False)

    def stop(self) -> None:
        """End the record, because the run is complete."""
        self._is_main = False

    def record(self) -> dict[str, float]:
        """Content for a checkpoint, from which `resume` continues."""
        return {_FIRST_START: self._first_start, **self._seconds} if self._is_main else {}

    def figures(self) -> dict[str, Any]:
        """`share` of the wall time in steps that count, and `seconds` of each use."""
        if not self._is_main:
            return {}
        accounted_s = sum(self._seconds.values())
        down_s = max(0.0, self._last - self._first_start - accounted_s)
        seconds = self._seconds | {"down": down_s}
        share = self._seconds["steps"] / max(accounted_s + down_s, 1e-9)
        return {"share": share, "seconds": {use: round(s, 3) for use, s in seconds.items()}}

    def curves(self) -> dict[str, float]:
        """Shares of the wall time by use, as metrics."""
        figures = self.figures()
        if not figures:
            return {}
        wall_s = max(sum(figures["seconds"].values()), 1e-9)
        shares = {f"speed/wall_{use}": s / wall_s for use, s in figures["seconds"].items()}
        return {"speed/goodput": shares.pop("speed/wall_steps"), **shares}

    def _read(self) -> bool:
        """Read the record of earlier starts. Returns whether there is a usable one."""
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            first_start = float(content[_FIRST_START])
            seconds: dict[str, float] = {use: float(content["seconds"][use]) for use in USES}
            if not all(0 <= value < math.inf for value in (first_start, *seconds.values())):
                raise ValueError("a time is negative or not finite")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            logger.warning(
                "%s can't be read (%s): goodput starts again from zero", self._file, error
            )
            return False
        self._first_start, self._seconds = first_start, seconds
        return True
