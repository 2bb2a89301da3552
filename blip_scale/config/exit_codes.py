"""Exit codes of every command and job script.

Imports nothing: slurm/requeue.py runs this module on a Python without packages.
"""

from __future__ import annotations

DONE = 0
"""The work is finished."""
FAILED = 1
"""A failure that may not recur, or items that could not be processed; the output names them."""
REFUSED = 2
"""Input that cannot be used; the message says what, where and how to fix it. Only
`errors.is_refused` decides on this code, because a SLURM job that ends with it is not requeued."""
REQUEUE = 75
"""Stopped on request with everything saved; run the same command again (EX_TEMPFAIL)."""


def of_signal(number: int) -> int:
    """Return the exit code that a shell reports for a command ended by a signal."""
    return 128 + number
