"""The exception for input that is refused: the caller must change it, trying again won't help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class RefusedInput(ValueError):
    """Input that cannot be used. The message says what, where and how to fix it, in one line.

    Commands end with exit code 2 on it, and a job of SLURM isn't started again. Any other exception
    is a failure: exit code 1.
    """


class MissingInput(RefusedInput, FileNotFoundError):
    """Input that is not there."""


_PATHS = FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError


def is_refused(error: BaseException) -> bool:
    """Whether an error is about input: `RefusedInput`, a ValueError that this package itself
    raised, or a path that isn't there, is of another kind or is there already.

    A ValueError out of a library (torch, NumPy, a server's answer) is a failure, and so are other
    errors of the operating system: a full disk, a remote out of reach.
    """
    if isinstance(error, RefusedInput | _PATHS):
        return True
    return isinstance(error, ValueError) and _is_ours(error)


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost function that the error came from is of this package."""
    trace = error.__traceback__
    module = ""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return module.partition(".")[0] == __name__.partition(".")[0]


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Inside, where input is opened, an error about it becomes `RefusedInput`."""
    try:
        yield
    except RefusedInput:
        raise
    except (ValueError, OSError) as error:
        if not is_refused(error):
            raise
        kind = MissingInput if isinstance(error, FileNotFoundError) else RefusedInput
        raise kind(str(error)) from error
