"""What all commands share: the parser, and the one line that tells about refused input."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from blip_scale import launcher, logs
from blip_scale.config import exit_codes
from blip_scale.errors import RefusedInput, is_refused

logger = logging.getLogger(__name__)

_RANK_0_SPEAKS_S = 3.0

# What commands without a log of their own warn of goes to stderr by this handler.
if logging.lastResort is not None:
    logging.lastResort.setFormatter(logs.MessageFormatter())


class Parser(argparse.ArgumentParser):
    """An argparse parser that refuses wrong arguments in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """End the process with the exit code of refused input."""
        sys.exit(refuse(self.prog, f"{message} (see {self.prog} --help)"))


def refuse(command: str, problem: object) -> int:
    """Write `command: problem` as one line to stderr; returns the exit code of refused input."""
    sys.stderr.write(f"{command}: {logs.one_line(problem)}\n")
    return exit_codes.REFUSED


def report_error(command: str, error: Exception) -> int:
    """Write `command: error` as one line to stderr; returns the exit code: that of refused input,
    or that of a failure where the input is not to blame."""
    code = refuse(command, str(error) or type(error).__name__)
    return code if is_refused(error) else exit_codes.FAILED


def report_error_of_rank(command: str, error: Exception, log_folder: Path | None) -> int:
    """`report_error` of one of several ranks that were started together.

    Input that is judged before a run is refused by all ranks alike, so rank 0 speaks. In a run any
    rank may be the one, and the traceback goes to its log; there `errors.refusing` has told input
    from a failure, and whatever else comes is a failure.

    Args:
        command: name of the command.
        error: what ended it.
        log_folder: of the ranks' logs, once the run has begun.
    """
    rank = launcher.rank()
    if log_folder is not None:
        logger.debug("stopped by", exc_info=error)
        speaker = f"{command} (rank {rank})" if rank else command
        refuse(speaker, f"{error} (traceback in {log_folder})")
        return exit_codes.REFUSED if isinstance(error, RefusedInput) else exit_codes.FAILED
    if rank == 0:
        return report_error(command, error)
    time.sleep(_RANK_0_SPEAKS_S)  # a launcher ends all ranks once one has ended
    return exit_codes.REFUSED if is_refused(error) else exit_codes.FAILED


def interrupt_on_sigterm() -> None:
    """Have SIGTERM raise KeyboardInterrupt, as Ctrl-C does; `stopped` tells the two apart."""
    signal.signal(signal.SIGTERM, _interrupt)


def stopped(interrupt: KeyboardInterrupt, kept: str) -> int:
    """Say what of an interrupted command is kept; returns the exit code of the signal.

    Args:
        kept: what is finished, in the plural: "finished shards".
    """
    sys.stderr.write(f"stopped; {kept} are kept, the same command goes on\n")
    return exit_codes.of_signal(int(str(interrupt) or signal.SIGINT))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)
