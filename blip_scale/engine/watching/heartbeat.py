"""Heartbeat of a run: a small file for watchers, and beats for the timer of stalls."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from blip_scale.engine.watching.hang_limits import HangLimits, Phase
from blip_scale.engine.watching.stalls import StallTimer
from blip_scale.storage import files, run_folder

_COUNTS = ("step", "total_steps", "checkpoint_step", "restarts")
_EVERY_S = 1.0


class Heartbeat:
    """Writes the state of a run, and keeps the timer of stalls running.

    Rank 0 writes heartbeat.json: step, total_steps, time (Unix), samples_per_s, checkpoint_step
    (the newest committed one, 0 without any), phase, job_id (SLURM's, else null), restarts
    (earlier starts of this run) and, while training, goodput (`Goodput.figures`). A start continues
    the counts of the start before it.

    Every rank has the timer: without a beat it ends the process (`StallTimer`).
    """

    def __init__(self, output_dir: Path, rank: int, limits: HangLimits) -> None:
        """Start the timer and write phase `starting`.

        Args:
            output_dir: folder of the run; it exists and has the logs.
            rank: rank of this process among all.
            limits: longest times between two beats.
        """
        self._file = output_dir / run_folder.HEARTBEAT
        self._is_main = rank == 0
        self.timer = StallTimer(output_dir, rank, limits)
        self._disk = files.Spared(f"heartbeat in {self._file}")
        self._written = 0.0
        self.before = self._earlier_counts() if self._is_main else {}
        """Counts of the previous start; empty if there is none."""
        self._state: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | self.before
        self._state["restarts"] += bool(self.before)
        self._state["job_id"] = os.environ.get("SLURM_JOB_ID")
        self.beat("starting", samples_per_s=0.0)

    def beat(self, phase: Phase, **figures: Any) -> None:
        """Reset the timer; write the file when the phase changes, else about once a second.

        Args:
            phase: current phase.
            figures: those of step, total_steps, checkpoint_step, samples_per_s, goodput that
                changed.
        """
        self.timer.beat(phase, int(figures["step"]) if "step" in figures else None)
        if not self._is_main:
            return
        now = time.time()
        changed = phase != self._state.get("phase")
        self._state |= {"time": now, "phase": phase, **figures}
        if changed or not 0 <= now - self._written < _EVERY_S:
            self._written = now
            with self._disk:
                files.write_whole(self._file, json.dumps(self._state) + "\n", through=False)

    def close(self) -> None:
        """Stop the timer."""
        self.timer.close()

    def _earlier_counts(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            return {name: int(content[name]) for name in _COUNTS}
        except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
            return {}
