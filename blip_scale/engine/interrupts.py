"""SIGTERM, SIGUSR1 and Ctrl-C -> a clean stop at a step boundary, agreed by all ranks."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequested(Exception):
    """A signal came where nothing would be lost by stopping at once."""


class Interrupts:
    """Remembers that a signal came; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._at_once = False
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if self._at_once:
            raise StopRequested(self.received)

    @property
    def is_pending(self) -> bool:
        """Whether this rank received a signal."""
        return self.received is not None

    def announce(self) -> None:
        """Log that the run stops, on every rank once any of them received a signal."""
        logger.info("%s: stopping after this step", self.received or "a signal on another rank")

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Inside, everything is saved: a signal raises `StopRequested`, also one from before.

        Ranks need not agree: what another rank makes of the exchange that this one left, an error,
        is taken for the same where this rank was to stop too.
        """
        self._at_once = True
        try:
            if self.received is not None:
                raise StopRequested(self.received)
            yield
        except Exception as error:
            if self.received is None or isinstance(error, StopRequested):
                raise
            raise StopRequested(self.received) from error
        finally:
            self._at_once = False

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
