"""Signs of life: a small file for those who watch a run from outside, and a timer that ends a
process which gives none."""

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
_SPOKEN_S = 0.5
"""Time in which a stall is named on the terminal before the process ends."""
_POLL_S = 10.0
_GRACE_S = 30.0
"""After it the kernel ends a process whose stacks could not be written (a dead disk)."""


class Heartbeat:
    """Says where a run stands, and ends this process when it says nothing for too long.

    Rank 0 keeps heartbeat.json: step, total_steps, time (unix), samples_per_s, checkpoint_step (the
    newest that is committed, 0 without), phase, job_id (of SLURM, null elsewhere) and restarts
    (starts of this run before this one). A start goes on from what the one before left there.

    Every rank has the timer. It runs in a thread of C and needs neither the interpreter nor the
    main thread, so it goes off inside a collective and inside a hung file system; then the stacks
    of all Python threads are in the rank's log and the process ends with exit code 1.
    """

    def __init__(self, output_dir: Path, rank: int, stall_timeout_s: float) -> None:
        """Begin with phase `starting`.

        Args:
            output_dir: folder of the run, there already with its logs.
            rank: rank of this process among all.
            stall_timeout_s: longest time between two beats; 0: for ever.
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
        self.before = self._left_by_the_start_before() if self._is_main else {}
        """What the start before this one said last, empty without one."""
        self._state: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | self.before
        self._state["restarts"] += bool(self.before)
        self._state["job_id"] = os.environ.get("SLURM_JOB_ID")
        self.beat("starting", samples_per_s=0.0)
        if self._log is not None:
            threading.Thread(target=self._speak, name="stall", daemon=True).start()

    def beat(self, phase: Phase, **figures: float) -> None:
        """Wind up the timer; write the file at a change of phase, else about once a second.

        Args:
            phase: what begins now or goes on.
            figures: step, total_steps, checkpoint_step, samples_per_s: those that changed.
        """
        self._phase = phase
        self._wind_up()
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

    def _wind_up(self) -> None:
        if self._log is None:
            return
        self._deadline = time.monotonic() + self._stall_timeout_s
        after_s = self._stall_timeout_s + _SPOKEN_S
        faulthandler.dump_traceback_later(after_s, file=self._log, exit=True)
        signal.setitimer(signal.ITIMER_REAL, self._stall_timeout_s + _GRACE_S)  # SIGALRM kills

    def _speak(self) -> None:
        """Name the phase that stalled on the terminal, just before the timer ends the process.

        The timer's own thread knows no Python. This one can't speak where the interpreter's lock is
        held, and then the log has the stacks alone.
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

    def _left_by_the_start_before(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return {name: int(found[name]) for name in _COUNTS}
        except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
            return {}


def _opened(log_file: Path) -> TextIO:
    """The log for the stacks of a process that stalls; stderr where it can't be opened."""
    try:
        return log_file.open("a")
    except OSError as error:
        logger.warning("%s can't be opened (%s): stacks of a stall go to stderr", log_file, error)
        return os.fdopen(os.dup(2), "a")
