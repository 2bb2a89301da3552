"""Slow work in a thread on every rank, which all ranks then continue together.

No collective runs in a thread: its order among the collectives of the training would differ between
ranks.
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
    """Call `work` and return its outcome. A rank that raised would leave the others waiting."""
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

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait until the procedure is done, or until `timeout_s` have passed on some rank."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_done:
            self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if self._is_busy():
                return
            self._resume()

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
