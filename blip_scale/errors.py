"""Exceptions for refused input, which the caller must change. A retry would not help."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


class RefusedInput(ValueError):
    """Input that cannot be used. The message says what, where and how to fix it, in one line.

    A command that raises it ends with exit code 2, and a SLURM job is not requeued. Any other
    exception is a failure, with exit code 1.
    """


class MissingInput(RefusedInput, FileNotFoundError):
    """Input that does not exist."""


_PATHS = FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError


def is_refused(error: BaseException) -> bool:
    """Return True if an error is about input rather than a failure.

    Such errors are `RefusedInput`, a ValueError raised by this package, and a path that is missing,
    already exists or has the wrong type. A ValueError raised by a library (torch, NumPy, parsing a
    server's response) is a failure. Other errors of the operating system, such as a full disk or an
    unreachable remote, are failures, too.
    """
    if isinstance(error, RefusedInput | _PATHS):
        return True
    return isinstance(error, ValueError) and _is_ours(error)


def in_words(error: BaseException) -> str:
    """Return the message of an error, with a fix for a full disk or a file in place of a folder."""
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename is not None:
        path = Path(error.filename)
        for place in (path, *path.parents):
            if place.is_file():
                return (
                    f"{place} is a file, but a folder is needed: remove it or give another folder"
                )
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{message}: the disk is full; free some space, or write to another disk"
    return message


def _is_ours(error: BaseException) -> bool:
    """Return True if the innermost function in the error's traceback is in this package."""
    trace = error.__traceback__
    module = ""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return module.partition(".")[0] == __name__.partition(".")[0]


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Context manager that turns errors about input into `RefusedInput`."""
    try:
        yield
    except RefusedInput:
        raise
    except (ValueError, OSError) as error:
        if not is_refused(error):
            raise
        kind = MissingInput if isinstance(error, FileNotFoundError) else RefusedInput
        raise kind(in_words(error)) from error
