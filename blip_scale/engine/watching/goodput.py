"""Goodput of a run: the share of wall time spent on optimizer steps whose result was kept.

Wall time begins at the first start of the run and includes the time when no process runs. Each
start continues the record in `goodput.json` in the run folder. Checkpoints hold a copy in case the
file is lost.
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
"""Use of wall time.

`steps`: optimizer steps whose result was kept, each counted once. `start`: from the start of the
process to its first step. `saving`: pauses for checkpoints and uploads. `repeated`: steps without
an update, or whose result was lost in a failure. `other`: logs and reports.
"""
USES: tuple[Use, ...] = ("steps", "start", "evaluation", "saving", "repeated", "other")

_EVERY_S = 1.0
_FIRST_START = "first_start"


class Goodput:
    """Wall time of a run by use. On ranks other than the main one, calls have no effect.

    Each call of `spend` assigns the time since the last call to a use. Unassigned time is `down`:
    waiting in the queue, failed nodes, and the time of a process after its last `spend`.
    """

    def __init__(self, output_dir: Path, is_main: bool) -> None:
        """Continue the record of earlier starts. If the file cannot be read, start from zero.

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
        """Keep only the step time that the checkpoint contains, and count the rest as `repeated`.

        If the checkpoint accounts for more time than the file, use its record instead. The file is
        written only about once a second.

        Args:
            saved: result of `record` in the checkpoint, or empty without a checkpoint.
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
        """Assign the time since the last call to `use`. Write the file about once a second."""
        if not self._is_main:
            return
        now = time.time()
        self._seconds[use] += max(0.0, now - self._last)  # the system clock may be set back
        self._last = now
        if not 0 <= now - self._written < _EVERY_S:
            self._written = now
            with self._disk:
                content = {_FIRST_START: self._first_start, **self.figures()}
                files.write_whole(self._file, json.dumps(content) + "\n", through=False)

    def stop(self) -> None:
        """Stop recording, because the run is complete."""
        self._is_main = False

    def record(self) -> dict[str, float]:
        """Return the record to store in a checkpoint, for `resume`."""
        return {_FIRST_START: self._first_start, **self._seconds} if self._is_main else {}

    def figures(self) -> dict[str, Any]:
        """Return the `share` of wall time in `steps`, and the `seconds` of each use."""
        if not self._is_main:
            return {}
        accounted_s = sum(self._seconds.values())
        down_s = max(0.0, self._last - self._first_start - accounted_s)
        seconds = self._seconds | {"down": down_s}
        share = self._seconds["steps"] / max(accounted_s + down_s, 1e-9)
        return {"share": share, "seconds": {use: round(s, 3) for use, s in seconds.items()}}

    def curves(self) -> dict[str, float]:
        """Return the shares of wall time by use, as metrics."""
        figures = self.figures()
        if not figures:
            return {}
        wall_s = max(sum(figures["seconds"].values()), 1e-9)
        shares = {f"speed/wall_{use}": s / wall_s for use, s in figures["seconds"].items()}
        return {"speed/goodput": shares.pop("speed/wall_steps"), **shares}

    def _read(self) -> bool:
        """Read the record of earlier starts. Return False if the file is not usable."""
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
