"""Handle SIGINT and SIGTERM before a command's work begins.

This module imports nothing slow, so that signals are handled while the command is imported.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from blip_scale.config import exit_codes


def stop_at_once_on_signals() -> None:
    """End the process on SIGINT or SIGTERM with one line, until the command sets its own handlers.

    Importing a command takes seconds, and there is nothing to clean up yet.
    """
    handle_signals(_stop)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle SIGINT and SIGTERM. An ignored signal stays ignored.

    Shells start background jobs with SIGINT ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")  # the signal may have interrupted a write to sys.stderr
    os._exit(exit_codes.of_signal(number))
