"""Functions shared by all commands: the argument parser, and one-line error messages."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from blip_scale import launcher, logs
from blip_scale.commands.signals import handle_signals
from blip_scale.config import exit_codes
from blip_scale.config.bounds import MOST_BATCH, MOST_BEAMS, MOST_PROCESSES, MOST_SIDE, MOST_WIDTH
from blip_scale.errors import RefusedInput, in_words, is_refused

if TYPE_CHECKING:
    from tqdm import tqdm

    from blip_scale.data.conversion.run import Progress

logger = logging.getLogger(__name__)

_RANK_0_SPEAKS_S = 3.0
_MOST_OF = {
    "beams": MOST_BEAMS,
    "captions": MOST_BEAMS,
    "batch_size": MOST_BATCH,
    "image_size": MOST_SIDE,
    "max_tokens": MOST_WIDTH,
    "threads": MOST_PROCESSES,
    "workers": MOST_PROCESSES,
}
"""Option name, with underscores -> largest value allowed in any command."""

# Warnings of commands that do not configure logging go to stderr through this handler.
if logging.lastResort is not None:
    logging.lastResort.setFormatter(logs.MessageFormatter())


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports wrong arguments in one line, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Report the message, and end the process with the exit code for refused input."""
        sys.exit(refuse(self.prog, f"{message} (see {self.prog} --help)"))


def refuse(command: str, problem: object) -> int:
    """Write `command: problem` to stderr as one line. Return the exit code for refused input."""
    sys.stderr.write(f"{command}: {logs.one_line(problem)}\n")
    return exit_codes.REFUSED


def report_error(command: str, error: Exception) -> int:
    """Write `command: error` to stderr as one line, and return the exit code.

    The exit code is `REFUSED` if the input caused the error, and `FAILED` otherwise.
    """
    code = refuse(command, in_words(error))
    return code if is_refused(error) else exit_codes.FAILED


def report_error_of_rank(command: str, error: Exception, log_folder: Path | None) -> int:
    """Report an error on one of several ranks, and return the exit code.

    Before the run begins, all ranks usually refuse the same input. Rank 0 reports the error first,
    and the launcher then ends the other ranks. The other ranks wait, and report the error
    themselves only if rank 0 has none.

    During the run, any rank may fail, and its log holds the traceback. Only errors marked by
    `errors.refusing` count as refused input; all others are failures.

    Args:
        command: name of the command.
        error: the error that ended the command.
        log_folder: folder of the ranks' logs once the run has begun, else None.
    """
    rank = launcher.rank()
    if log_folder is not None:
        logger.debug("stopped by", exc_info=error)
        speaker = f"{command} (rank {rank})" if rank else command
        where = f" (traceback in {log_folder})" if log_folder.is_dir() else ""
        refuse(speaker, f"{error}{where}")
        return exit_codes.REFUSED if isinstance(error, RefusedInput) else exit_codes.FAILED
    if rank == 0:
        return report_error(command, error)
    time.sleep(_RANK_0_SPEAKS_S)  # the launcher ends all ranks as soon as one has ended
    return report_error(f"{command} (rank {rank})", error)


def run_command(prog: str, work: Callable[[], int], kept: str = "") -> int:
    """Call a command's work function, and return the exit code.

    An OSError, a ValueError or a signal (SIGINT, SIGTERM) ends the work with one line on stderr.

    Args:
        prog: name of the command.
        work: function that returns the exit code.
        kept: name, in the plural, of the finished work from which a stopped command resumes, such
            as "finished shards"; "" if the command can't resume.
    """
    handle_signals(_interrupt)
    try:
        return work()
    except (OSError, ValueError) as error:
        return report_error(prog, error)
    except KeyboardInterrupt as stop:
        advice = f"; {kept} are kept, run the same command to resume" if kept else ""
        sys.stderr.write(f"stopped{advice}\n")
        return exit_codes.of_signal(int(str(stop) or signal.SIGINT))


def check_least(options: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Check that the values of numeric options are within their bounds.

    Args:
        options: the parsed options.
        least: option name, with underscores -> smallest value allowed.

    Raises:
        ValueError: a value is below its minimum, or above its maximum in `_MOST_OF`.
    """
    for name, smallest in least.items():
        value, option = getattr(options, name, None), name.replace("_", "-")
        if value is not None and value < smallest:
            raise ValueError(f"--{option} {value}: expected {smallest} or more")
        most = _MOST_OF.get(name)
        if value is not None and most is not None and value > most:
            raise ValueError(f"--{option} {value}: expected at most {most}")


def within(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """Return an argparse type for numbers from `least` to `most`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most:
                return value
        name = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text}: expected {name} from {least:,} to {most:,}")

    return parse


def progress_on(bar: tqdm, chunk: str) -> Callable[[Progress], None]:
    """Return a function that shows the progress of a conversion on a progress bar.

    Args:
        bar: progress bar that counts pairs.
        chunk: word for a part of the input: tar, shard, chunk.
    """

    def show(progress: Progress) -> None:
        bar.total = progress.pairs
        share = progress.rejected / max(1, progress.read)
        done = f"{chunk} {progress.chunks_done}/{progress.chunks}"
        bar.set_postfix_str(f"{share:.1%} rejected, {done}", refresh=False)
        bar.update(progress.read - bar.n)

    return show


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)
