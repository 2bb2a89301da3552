"""Warn about slow downloads long before the retries end."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

SLOW_S = 30.0
"""Seconds without new bytes of a file after which a warning is logged. A file arrives in chunks of
`objects.CHUNK_BYTES`."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def warned_if_slow(what: str, held_bytes: Callable[[], int]) -> Iterator[None]:
    """Context manager that logs warnings while no new bytes of a file arrive.

    Args:
        what: the file and its source, for the warning.
        held_bytes: returns the number of bytes received, by this or another process.
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
