"""SIGINT and SIGTERM before a command's work begins.

Imports nothing that takes time, so that a signal is handled while the command is imported.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from blip_scale.config import exit_codes


def stop_at_once_on_signals() -> None:
    """End the process on SIGINT or SIGTERM in one line, until the command replaces this.

    The imports of a command take seconds, and there is nothing to clean up yet.
    """
    handle_signals(_stop)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle SIGINT and SIGTERM, unless ignored: shells ignore SIGINT for background jobs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")  # sys.stderr may be in use
    os._exit(exit_codes.of_signal(number))
