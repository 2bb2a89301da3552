"""Warnings of files that are awaited for long, before their remote is given up."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

SLOW_S = 30.0
"""Seconds in which nothing of a file arrives, after which the wait for it is a warning. A file
arrives in requests of `objects.CHUNK_BYTES`."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def warned_if_slow(what: str, held_bytes: Callable[[], int]) -> Iterator[None]:
    """Inside, warn of a wait for a file as long as nothing of it arrives.

    Args:
        what: subject of the warning: the file, and where it comes from.
        held_bytes: returns how many of its bytes have arrived, in this process or in another.
    """
    ended = threading.Event()
    threading.Thread(target=_warn, args=(what, held_bytes, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _warn(what: str, held_bytes: Callable[[], int], ended: threading.Event) -> None:
    began, before = time.monotonic(), 0
    while not ended.wait(SLOW_S):
        held = held_bytes()
        if held <= before:
            logger.warning(
                "%s: waiting for %.0f s, and no data for %.0f s (%d bytes received)",
                what, time.monotonic() - began, SLOW_S, held,
            )  # fmt: skip
        before = held
