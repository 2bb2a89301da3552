"""SIGTERM, SIGUSR1 and Ctrl-C -> a clean stop at a step boundary, agreed by all ranks."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupts:
    """Remembers that a signal came; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    @property
    def is_pending(self) -> bool:
        """Whether this rank received a signal."""
        return self.received is not None

    def announce(self) -> None:
        """Log that the run stops, on every rank once any of them received a signal."""
        logger.info("%s: stopping after this step", self.received or "a signal on another rank")

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
