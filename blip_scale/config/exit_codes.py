"""Exit codes of every command and job script. slurm/requeue.py runs this on a bare Python."""

from __future__ import annotations

DONE = 0
"""The work is finished."""
FAILED = 1
"""A failure that may not come again, or items that could not be processed and were named."""
REFUSED = 2
"""Input that cannot be used: the message says what, where and how to fix it. Of `errors.is_refused`
alone, as a job with this code isn't started again."""
REQUEUE = 75
"""Stopped on request with everything saved; start the same command again (EX_TEMPFAIL)."""


def of_signal(number: int) -> int:
    """Exit code of a command that ends because of a signal, as shells write it."""
    return 128 + number
