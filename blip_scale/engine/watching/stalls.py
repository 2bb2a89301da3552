"""Watchdog that ends a hung process, writes its stacks and names the ranks that caused the hang."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TextIO

from blip_scale import logs
from blip_scale.engine.watching import batches
from blip_scale.engine.watching.hang_limits import HangLimits, Phase
from blip_scale.engine.watching.peers import (
    Peers,
    RankState,
    RollCall,
    Suspect,
    in_words,
    is_silent,
    named,
    node_name,
    suspects,
)
from blip_scale.storage import run_folder

logger = logging.getLogger(__name__)

_MESSAGE_S = 2.0
"""Time between the hang limit and the end of the process, in which the message is written."""
_GRACE_S = 30.0
"""Time after the hang limit at which SIGALRM ends the process. It is needed if writing the stacks
blocks, for example on a dead disk."""
_LONGEST_TICK_S = 5.0
_TICKS = 20
"""Minimum number of times that a rank publishes its state within the shortest limit."""
_FIRST_READING, _SECOND_READING = 5, 1
"""Ticks left before the deadline when the states of all ranks are read."""
_SILENT_S = 60.0
"""Time without a published state after which a rank counts as lost. A background thread publishes
every few seconds, so a step or a collective may take longer than this limit."""
_LONG_WAIT_S = 30.0
"""Duration of a wait for the loader after which a warning is logged."""
_WATCHED: tuple[Phase, ...] = ("training", "evaluating", "saving")
"""Phases in which a silent rank counts as lost. Other phases are excluded: imports and compilation
may hold the GIL for long at the start, and ranks exit at different times at the end."""


class StallTimer:
    """Watchdog timer that ends this process if `beat` is not called within the limit of the phase.

    The timer is the C thread of `faulthandler`. It needs neither the GIL nor the main thread, so it
    also fires inside a collective or while a file system hangs. It writes the stacks of all Python
    threads to the rank's log and ends the process with exit code 1.

    Just before, a Python thread reports the stall on the terminal, in the rank's log and in
    stalls.jsonl. If the GIL is held, this thread cannot run, and the log has only the stacks. The
    thread also extends the limit while a rank waits for data from a remote that may be retried.

    A stopped process or a lost node is detected before a long limit expires. Rank 0 watches all
    ranks for missing states, and each other rank watches rank 0.
    """

    def __init__(self, output_dir: Path, rank: int, limits: HangLimits) -> None:
        """Start the timer in phase `starting`.

        Args:
            output_dir: folder of the run. It must exist and contain the logs.
            rank: global rank of this process.
            limits: hang limit of each phase.
        """
        self._output_dir, self._rank, self._limits = output_dir, rank, limits
        self._node = node_name()
        self._log_file = output_dir / run_folder.log_of(rank)
        self._tick_s = min(_LONGEST_TICK_S, limits.shortest_s / _TICKS)
        self._phase: Phase = "starting"
        self._step = 0
        self._beat = time.monotonic()
        self._deadline = math.inf
        self._is_ending = False
        self._arming = threading.Lock()
        self._closed = threading.Event()
        self._data_since: float | None = None
        self._warned_since: float | None = None
        self._exchanges: Callable[[], int] = int
        self._peers: Peers | None = None
        self._pulse = 0
        self._roll_call = RollCall(math.ceil(_SILENT_S / self._tick_s))
        self._log = None if math.isinf(limits.shortest_s) else _opened(self._log_file)
        if self._log is not None:
            self._arm()
            batches.listen(self.note_batch)
            threading.Thread(target=self._watch, name="stall", daemon=True).start()

    def join(self, world_size: int, exchanges: Callable[[], int]) -> None:
        """Begin to exchange states with the other ranks. Call after `init_process_group`.

        Args:
            world_size: number of ranks.
            exchanges: function that returns the number of collectives that this rank has begun.
        """
        self._exchanges = exchanges
        if self._log is None or world_size == 1:
            return
        try:
            self._peers = Peers(self._rank, world_size)
        except RuntimeError as error:
            logger.warning("the rank that hangs can't be named if one does: %s", error)

    def beat(self, phase: Phase, step: int | None) -> None:
        """Record progress and restart the timer.

        Args:
            phase: current phase.
            step: completed optimizer steps. None: unchanged since the last beat.
        """
        now = time.monotonic()
        if step is not None:
            if step == self._step + 1 and phase == self._phase == "training":
                self._limits.note_step(now - self._beat)
            self._step = step
        self._phase, self._beat = phase, now
        self._arm()

    def note_batch(self, is_next: bool) -> None:
        """Record progress of an evaluation and restart the timer. Ignored in other phases.

        Args:
            is_next: True before a batch, False after a loop over batches.
        """
        if self._phase != "evaluating":
            return
        now = time.monotonic()
        if is_next:
            self._limits.note_batch(now - self._beat)
        else:
            self._limits.end_batches()
        self._beat = now
        self._arm()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Context manager that measures a wait for the loader."""
        self._data_since = time.monotonic()
        try:
            yield
        finally:
            self._data_since = None

    def close(self) -> None:
        """Stop the timer."""
        self._closed.set()
        batches.listen(None)
        with self._arming:
            if self._log is not None:
                faulthandler.cancel_dump_traceback_later()
                signal.setitimer(signal.ITIMER_REAL, 0)
                self._log.close()
                self._log = None

    def _arm(self, deadline: float | None = None) -> None:
        """Restart the timer with the limit of the phase.

        Args:
            deadline: if set, do nothing unless this is still the current deadline.
        """
        with self._arming:
            is_late = deadline is not None and deadline != self._deadline
            if self._log is None or self._is_ending or is_late:
                return
            limit_s = self._limits.of_phase(self._phase)
            self._deadline = time.monotonic() + limit_s
            if math.isinf(limit_s):
                faulthandler.cancel_dump_traceback_later()
                signal.setitimer(signal.ITIMER_REAL, 0)
                return
            faulthandler.dump_traceback_later(limit_s + _MESSAGE_S, file=self._log, exit=True)
            signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)  # SIGALRM ends the process

    def _watch(self) -> None:
        """Publish the rank's state at each tick. Near the deadline, read all states twice."""
        before: dict[int, RankState] | None = None
        while not self._closed.wait(self._tick_s):
            self._publish()
            self._warn_of_data_wait()
            if self._phase in _WATCHED and (lost := self._lost()):
                self._end_for(lost)
                return
            deadline = self._deadline
            ticks_left = (deadline - time.monotonic()) / self._tick_s
            if ticks_left > _FIRST_READING:
                before = None
            elif before is None:
                before = self._read()
            elif ticks_left <= _SECOND_READING:
                states = self._read()
                retrying = self._retrying(before, states)
                if retrying is not None:
                    logger.warning(
                        "rank %d on %s has waited %.0f s for data: its remote may be retried for "
                        "%.0f s, so the hang limit is extended",
                        retrying.rank, retrying.node, retrying.data_wait_s,
                        self._limits.data_retry_s,
                    )  # fmt: skip
                    self._arm(deadline)
                    continue
                self._closed.wait(max(0.0, deadline - time.monotonic()))
                if deadline == self._deadline and not self._closed.is_set():
                    limit_s = self._limits.of_phase(self._phase)
                    setting = self._limits.setting_of(self._phase)
                    suspected = suspects(before, states)
                    self._report("no progress", limit_s, suspected, f" (hang_limits.{setting})")
                    return

    def _state(self) -> RankState:
        since = self._data_since
        return RankState(
            self._rank, self._node, self._phase, self._step, self._exchanges(),
            0.0 if since is None else time.monotonic() - since, self._pulse,
        )  # fmt: skip

    def _publish(self) -> None:
        self._pulse += 1
        if self._peers is not None:
            # `read` detects a store that does not answer.
            with contextlib.suppress(RuntimeError):
                self._peers.publish(self._state())

    def _warn_of_data_wait(self) -> None:
        """Warn once per long wait for the loader, and request the stacks of its workers."""
        since = self._data_since
        if since is None or since == self._warned_since:
            return
        waited_s = time.monotonic() - since
        if waited_s >= _LONG_WAIT_S:
            self._warned_since = since
            logger.warning(
                "step %d: rank %d on %s has waited %.0f s for data; if a remote is why, its loader "
                "workers log the stream and the shard; their stacks are in %s",
                self._step, self._rank, self._node, waited_s, self._log_file,
            )  # fmt: skip
            for process in multiprocessing.active_children():
                is_worker = isinstance(process, ForkServerProcess)
                if is_worker and process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, logs.STACKS)

    def _lost(self) -> list[Suspect]:
        """Return the lost ranks. Rank 0 watches all ranks, and the others watch only rank 0."""
        if self._peers is None:
            return []
        try:
            states = self._peers.read(only_main=self._rank != 0)
        except RuntimeError:
            states = {0: self._peers.silent_main()} if self._rank else {}
        self._roll_call.note(states)
        return self._roll_call.lost()

    def _end_for(self, lost: list[Suspect]) -> None:
        """End this process, because it would wait forever for the lost ranks."""
        with self._arming:
            if self._log is None:
                return
            self._is_ending = True
            faulthandler.dump_traceback_later(_MESSAGE_S, file=self._log, exit=True)
            signal.setitimer(signal.ITIMER_REAL, _GRACE_S)
        self._report("a rank has given no sign of life", _SILENT_S, lost)

    def _read(self) -> dict[int, RankState]:
        """Return the latest state of each rank.

        If the store does not answer, the result has only rank 0, marked as silent, and this rank.
        """
        states: dict[int, RankState] = {}
        if self._peers is not None:
            try:
                states = self._peers.read()
            except RuntimeError:  # the pulse never changes, so rank 0 counts as silent
                states = {0: self._peers.silent_main()}
        return states | {self._rank: self._state()}

    def _retrying(
        self, before: dict[int, RankState], states: dict[int, RankState]
    ) -> RankState | None:
        """Return a live rank that has waited for data for less than the retry time, or None."""
        if self._phase != "training":
            return None
        for state in states.values():
            may_wait = 0 < state.data_wait_s < self._limits.data_retry_s
            if may_wait and not is_silent(state, before):
                return state
        return None

    def _report(
        self, trouble: str, limit_s: float, suspected: list[Suspect], hint: str = ""
    ) -> None:
        """Report the stall on the terminal, in the rank's log and in stalls.jsonl.

        Args:
            trouble: problem, for the message.
            limit_s: duration of the problem in seconds.
            suspected: ranks that the others wait for.
            hint: setting that changes the limit, for the message.
        """
        if [suspect.rank for suspect in suspected] == [self._rank]:
            waits = "the others wait for this rank"
        elif suspected:
            waits = f"it waits for {named(suspected)}"
        elif self._peers is not None:
            waits = "no rank is behind the others"
        else:
            waits = "other ranks are not known"
        where = f"{in_words(self._phase, self._step)}{hint}"
        text = (
            f"rank {self._rank} on {self._node} stalled: {trouble} for {limit_s:g} s while "
            f"{where}; {waits}; ends now, stacks in {self._log_file}\n"
        )
        sys.stderr.write(text)
        sys.stderr.flush()
        entry = {
            "time": time.time(), "rank": self._rank, "node": self._node, "phase": self._phase,
            "step": self._step, "limit_s": limit_s,
            "suspects": [{"rank": s.rank, "node": s.node, "reason": s.reason} for s in suspected],
        }  # fmt: skip
        record = self._output_dir / run_folder.STALLS
        with contextlib.suppress(OSError), record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        with contextlib.suppress(OSError, ValueError):
            if self._log is not None:
                self._log.write(text)
                self._log.flush()


def _opened(log_file: Path) -> TextIO:
    """Open the rank's log to append stacks. If it cannot be opened, return stderr."""
    try:
        return log_file.open("a")
    except OSError as error:
        logger.warning("%s can't be opened (%s): stacks of a stall go to stderr", log_file, error)
        return os.fdopen(os.dup(2), "a")
