"""Heartbeat of a run: a small file for watchers, and a timer that ends a stalled process."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, TextIO

from blip_scale.storage import files, run_folder

logger = logging.getLogger(__name__)

Phase = Literal["starting", "training", "evaluating", "saving", "stopped", "done"]

_COUNTS = ("step", "total_steps", "checkpoint_step", "restarts")
_EVERY_S = 1.0
_MESSAGE_S = 0.5
"""Time for the message about a stall before the process ends."""
_POLL_S = 10.0
_GRACE_S = 30.0
"""Time after which the kernel ends a process whose stacks can't be written (a dead disk)."""


class Heartbeat:
    """Writes the state of a run, and ends this process when no beat comes for too long.

    Rank 0 writes heartbeat.json: step, total_steps, time (Unix), samples_per_s, checkpoint_step
    (the newest committed one, 0 without any), phase, job_id (SLURM's, else null), restarts
    (earlier starts of this run) and, while training, goodput (`Goodput.figures`). A start continues
    the counts of the start before it.

    Every rank has the timer. It is a C thread that needs neither the interpreter nor the main
    thread, so it also fires inside a collective or a hung file system. It writes the stacks of all
    Python threads to the rank's log and ends the process with exit code 1.
    """

    def __init__(self, output_dir: Path, rank: int, stall_timeout_s: float) -> None:
        """Start the timer and write phase `starting`.

        Args:
            output_dir: folder of the run; it exists and has the logs.
            rank: rank of this process among all.
            stall_timeout_s: longest time between two beats, in seconds; 0: no limit.
        """
        self._file = output_dir / run_folder.HEARTBEAT
        self._is_main = rank == 0
        self._stall_timeout_s = stall_timeout_s
        log_file = output_dir / run_folder.log_of(rank)
        self._rank, self._log_file = rank, log_file
        self._log = _opened(log_file) if stall_timeout_s else None
        self._phase: Phase = "starting"
        self._deadline = math.inf
        self._closed = threading.Event()
        self._disk = files.Spared(f"heartbeat in {self._file}")
        self._written = 0.0
        self.before = self._earlier_counts() if self._is_main else {}
        """Counts that the start before this one left; empty without one."""
        self._state: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | self.before
        self._state["restarts"] += bool(self.before)
        self._state["job_id"] = os.environ.get("SLURM_JOB_ID")
        self.beat("starting", samples_per_s=0.0)
        if self._log is not None:
            threading.Thread(target=self._report_stall, name="stall", daemon=True).start()

    def beat(self, phase: Phase, **figures: Any) -> None:
        """Reset the timer; write the file when the phase changes, else about once a second.

        Args:
            phase: current phase.
            figures: those of step, total_steps, checkpoint_step, samples_per_s, goodput that
                changed.
        """
        self._phase = phase
        self._reset_timer()
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
        self._closed.set()
        if self._log is not None:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._log.close()
            self._log = None

    def _reset_timer(self) -> None:
        if self._log is None:
            return
        self._deadline = time.monotonic() + self._stall_timeout_s
        after_s = self._stall_timeout_s + _MESSAGE_S
        faulthandler.dump_traceback_later(after_s, file=self._log, exit=True)
        signal.setitimer(signal.ITIMER_REAL, self._stall_timeout_s + _GRACE_S)  # SIGALRM kills

    def _report_stall(self) -> None:
        """Name the stalled phase on the terminal, just before the timer ends the process.

        The timer's C thread can't. This thread needs the interpreter's lock: where that is held,
        the log has the stacks alone.
        """
        while not self._closed.wait(min(_POLL_S, max(0.0, self._deadline - time.monotonic()))):
            if time.monotonic() < self._deadline:
                continue
            step = f", step {self._state['step']}" if self._is_main else ""
            sys.stderr.write(
                f"rank {self._rank} stalled: no progress for {self._stall_timeout_s:g} s while "
                f"{self._phase}{step}; ends now, stacks in {self._log_file}\n"
            )
            sys.stderr.flush()
            return

    def _earlier_counts(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            return {name: int(content[name]) for name in _COUNTS}
        except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
            return {}


def _opened(log_file: Path) -> TextIO:
    """The rank's log, for the stacks of a stall; stderr where it can't be opened."""
    try:
        return log_file.open("a")
    except OSError as error:
        logger.warning("%s can't be opened (%s): stacks of a stall go to stderr", log_file, error)
        return os.fdopen(os.dup(2), "a")
