"""Slow work in a thread on every rank. All ranks then continue together in the main thread.

Threads must not run collectives: their order relative to the collectives of training would differ
between ranks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from blip_scale.engine import collectives

logger = logging.getLogger(__name__)

_ROUND_S = 5.0
"""Seconds between two exchanges of the ranks' progress."""


@dataclass(frozen=True)
class Outcome:
    """Result of the work of one rank."""

    value: Any = None
    error: str = ""
    """Error message with the rank; empty if the work succeeded."""
    seconds: float = 0.0


Procedure = Generator[Callable[[], Any], list[Outcome], None]
"""Generator of work. Each function that it yields is called in a thread on every rank. Once all
ranks have finished, the generator goes on in the main thread with their outcomes, in rank order.
Between two yields it may use collectives."""


def attempt(work: Callable[[], Any], rank: int) -> Outcome:
    """Call `work` and return its outcome. If one rank raised here, the others would wait."""
    began = time.perf_counter()
    value, error = None, ""
    try:
        value = work()
    except Exception as problem:  # of the operating system, safetensors, the object storage
        logger.debug("failed in the background", exc_info=True)
        error = f"rank {rank}: {type(problem).__name__}: {problem}"
    return Outcome(value, error, time.perf_counter() - began)


def errors_of(outcomes: list[Outcome]) -> list[str]:
    """Error messages of all ranks."""
    return [outcome.error for outcome in outcomes if outcome.error]


class Background:
    """A running procedure. Every rank must start the same one and make the same calls."""

    def __init__(self, procedure: Procedure, device: torch.device) -> None:
        """Start the procedure.

        Args:
            procedure: see `Procedure`.
            device: device of the ranks' collectives.
        """
        self.is_done = False
        self._procedure = procedure
        self._device = device
        self._rank = collectives.rank()
        self._outcome = Outcome()
        self._thread = threading.Thread()
        self._start(next(procedure, None))

    def poll(self) -> None:
        """Continue the procedure if all ranks have finished their work."""
        if not self.is_done and not self._is_busy():
            self._resume()

    def finish(self) -> None:
        """Wait until the procedure is done."""
        while not self.is_done:
            self._thread.join()
            self._resume()

    def finish_while_moving(
        self, patience_s: float, progress: Callable[[], int], beat: Callable[[], None]
    ) -> float:
        """Wait until the procedure is done, or until no rank makes progress.

        Args:
            patience_s: time without progress after which to give up.
            progress: returns a count of this rank that grows with its progress.
            beat: is called on every rank when a rank has made progress.

        Returns:
            Seconds for which no rank had made progress at the end.
        """
        seen: list[int] = []
        since = time.monotonic()
        while not self.is_done:
            self._thread.join(min(_ROUND_S, patience_s))
            is_late = time.monotonic() - since >= patience_s
            ranks = collectives.all_gather_objects((self._thread.is_alive(), is_late, progress()))
            counts = [count for _, _, count in ranks]
            is_moving = counts != seen
            if is_moving:
                beat()
                seen, since = counts, time.monotonic()
            if not any(busy for busy, _, _ in ranks):
                self._resume()
            elif any(late for _, late, _ in ranks) and not is_moving:
                break
        return time.monotonic() - since

    def join(self, timeout_s: float) -> bool:
        """Wait for the work of this rank alone. Returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _is_busy(self) -> bool:
        return collectives.any_rank(self._thread.is_alive(), self._device)

    def _resume(self) -> None:
        try:
            work = self._procedure.send(collectives.all_gather_objects(self._outcome))
        except StopIteration:
            work = None
        self._start(work)

    def _start(self, work: Callable[[], Any] | None) -> None:
        if work is None:
            self.is_done = True
            return

        def run() -> None:
            self._outcome = attempt(work, self._rank)

        # A daemon thread, so that an upload that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
