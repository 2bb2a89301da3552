"""Heartbeat of a run: a small file for external monitoring, and beats for `StallTimer`."""

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
    """Writes the state of a run to heartbeat.json and resets the stall timer.

    Rank 0 writes heartbeat.json: step, total_steps, time (Unix), samples_per_s, checkpoint_step
    (step of the newest committed checkpoint, or 0), phase, job_id (SLURM job id, or null), restarts
    (number of earlier starts of this run) and, while training, goodput (`Goodput.figures`). A start
    continues the counts of the previous start.

    Each rank has a `StallTimer`, which ends the process if `beat` is not called in time.
    """

    def __init__(self, output_dir: Path, rank: int, limits: HangLimits) -> None:
        """Start the timer and write phase `starting`.

        Args:
            output_dir: folder of the run. It must exist and contain the logs.
            rank: global rank of this process.
            limits: hang limit of each phase.
        """
        self._file = output_dir / run_folder.HEARTBEAT
        self._is_main = rank == 0
        self.timer = StallTimer(output_dir, rank, limits)
        self._disk = files.Spared(f"heartbeat in {self._file}")
        self._written = 0.0
        self.before = self._earlier_counts() if self._is_main else {}
        """Counts of the previous start, or empty if there is none."""
        self._state: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | self.before
        self._state["restarts"] += bool(self.before)
        self._state["job_id"] = os.environ.get("SLURM_JOB_ID")
        self.beat("starting", samples_per_s=0.0)

    def beat(self, phase: Phase, **figures: Any) -> None:
        """Reset the timer. Write the file if the phase changes, else about once a second.

        Args:
            phase: current phase.
            figures: changed values among step, total_steps, checkpoint_step, samples_per_s and
                goodput.
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
