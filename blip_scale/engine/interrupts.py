"""Clean stops: SIGTERM, SIGUSR1 and Ctrl-C end a run at a step boundary, on all ranks alike."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequested(BaseException):
    """A signal arrived while everything was saved, so the run can stop at once.

    It is no `Exception`, as a signal can arrive anywhere: `logging`, for one, swallows those.
    """


class Interrupts:
    """Signal handlers that remember the signal. A second Ctrl-C stops at once."""

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
        """Log that the run stops. Every rank logs it once any rank has received a signal."""
        logger.info("%s: stopping after this step", self.received or "a signal on another rank")

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Context manager in which a signal raises `StopRequested`, also one that came earlier.

        Use it only while everything is saved. Ranks don't agree on the moment: one that stops
        leaves an exchange, which then fails on the others. So an error on a rank that has received
        a signal, too, is raised as `StopRequested`.
        """
        self._at_once = True
        try:
            if self.received is not None:
                raise StopRequested(self.received)
            yield
        except Exception as error:
            if self.received is None:
                raise
            raise StopRequested(self.received) from error
        finally:
            self._at_once = False

    def restore(self) -> None:
        """Put the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
