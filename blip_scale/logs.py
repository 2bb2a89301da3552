"""Logging: tidy lines on the terminal, everything in one file a rank, third parties kept quiet.

Ids, captions and paths come from data sets, and bring line breaks and escape sequences along. What
goes to a terminal, a log or a page goes through `printable` first, and through `without_secrets`.

The terminal gets our messages from INFO (rank 0) and every error (any rank), each on one line. The
rank's own file gets those with their tracebacks, and also the warnings and chatter of DeepSpeed,
torch, transformers and others, which a user cannot act on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import logging.handlers
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from blip_scale.storage import run_folder

PACKAGE = "blip_scale"
_EARLY_RECORDS = 10_000

_QUIET_ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # warnings that C++ code writes straight to stderr
    "TF_CPP_MIN_LOG_LEVEL": "2",  # TensorBoard loads TensorFlow where it is installed
    "TOKENIZERS_PARALLELISM": "false",  # it warns when a loader process is forked
}


_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)
"""Control characters, separators of lines, what turns the direction of a text, half surrogates."""
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@?#]+@"), "***@"),
    (
        re.compile(r"(?i)(?<=[?&])(x-amz-[\w-]+|sig\w*|\w*token|\w*key)=[^&\s'\"]+"),
        r"\1=***",
    ),
)
"""Of URLs: user and password, and what signs them."""
_SECRET_VARIABLE = re.compile(
    r"(?i)(secret|token(?!iz)|password|passwd|access_key|account_key|api_?key)(?!.*(file|path)$)"
)
_SHORTEST_SECRET = 8
"""Characters; a shorter value of such a variable (`1`, `true`) stands in too many words."""


def printable(text: str) -> str:
    """A text on one line, with escapes such as `\\n` and `\\u001b` for what a terminal would obey.

    JSON stays JSON of the same content.
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    return _SHORT.get(character, f"\\u{ord(character):04x}")


def without_secrets(text: str) -> str:
    """A text with *** for credentials: those of URLs, and values of variables that hold them."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return text


def one_line(text: object) -> str:
    """What is told of an error: its lines joined, printable and without secrets."""
    return printable(without_secrets(" ".join(str(text).split())))


def hold_third_party_noise() -> None:
    """Keep what third parties say while they are imported, for the file that `set_up` opens.

    Call it before torch and DeepSpeed are imported, and `set_up` before DeepSpeed starts.
    """
    for variable, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.captureWarnings(True)
    root = logging.getLogger()
    if not any(isinstance(handler, _EarlyHandler) for handler in root.handlers):
        root.addHandler(_EarlyHandler())
    # DeepSpeed makes its own terminal handler on import and warns right after it: divert it before.
    for name, kind in (("DeepSpeed", _ToRoot), ("py.warnings", _Once)):
        logger = logging.getLogger(name)
        if not any(isinstance(one, kind) for one in logger.filters):
            logger.addFilter(kind())


def set_up(output_dir: Path, rank: int) -> Path:
    """Send log records to the terminal and to `output_dir/logs/rank_N.log` (appended to).

    Calling it again moves the logs to another place.

    Args:
        output_dir: folder of the run; made when it is missing.
        rank: rank of this process among all.

    Returns:
        the rank's log file.
    """
    hold_third_party_noise()
    file = output_dir / run_folder.log_of(rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    logging.getLogger(PACKAGE).setLevel(logging.DEBUG)
    for handler in [one for one in root.handlers if isinstance(one, _RankFile | _Terminal)]:
        root.removeHandler(handler)
        handler.close()
    to_file = _RankFile(file)
    root.addHandler(to_file)
    root.addHandler(_Terminal(rank, file))
    for early in [one for one in root.handlers if isinstance(one, _EarlyHandler)]:
        root.removeHandler(early)
        for record in early.buffer:
            to_file.handle(record)
    _strip_third_party_handlers()
    threading.excepthook = _log_thread_failure
    return file


@contextlib.contextmanager
def prints_to_log(name: str) -> Iterator[None]:
    """Inside, what is printed to stdout becomes INFO records of the logger `name`."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in filter(str.strip, printed.getvalue().splitlines()):
            logging.getLogger(name).info("%s", line)


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """What ends a thread of a library (TensorBoard's writer on a full disk) is one line as well."""
    if failure.exc_value is not None and failure.exc_type is not SystemExit:
        logging.getLogger(__name__).error(
            "thread %s ended",
            failure.thread.name if failure.thread else "?",
            exc_info=(failure.exc_type, failure.exc_value, failure.exc_traceback),
        )


def _strip_third_party_handlers() -> None:
    """Take away the terminal handlers that libraries made for themselves; the root has ours."""
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] != PACKAGE:
            for handler in list(logger.handlers):
                if _writes_to_terminal(handler):
                    logger.removeHandler(handler)
                    logger.propagate = True


def _writes_to_terminal(handler: logging.Handler) -> bool:
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return getattr(handler, "stream", None) in streams


class _Once(logging.Filter):
    """Lets a message pass once: torch repeats its FutureWarnings at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        if message in self._seen:
            return False
        self._seen.add(message)
        return True


class _ToRoot(logging.Filter):
    """On a logger that does not propagate: hand its records to the root's handlers alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        logging.getLogger().handle(record)
        return False


class _EarlyHandler(logging.handlers.BufferingHandler):
    """Holds the records from before the log file is open; errors are shown at once as well."""

    def __init__(self) -> None:
        super().__init__(_EARLY_RECORDS)

    def shouldFlush(self, record: logging.LogRecord) -> bool:
        return False

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.buffer) < _EARLY_RECORDS:
            self.buffer.append(record)
        if record.levelno >= logging.ERROR:
            sys.stderr.write(f"{record.levelname} {record.name}: {_message(record)}\n")


class _RankFile(logging.FileHandler):
    """The rank's file. A disk that is full costs log lines, not the run."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, mode="a", encoding="utf-8")
        self.setFormatter(_Whole())
        self._failed = False

    def close(self) -> None:
        """Close; what a full disk did not take is gone."""
        with contextlib.suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that lines are being lost."""
        error = sys.exc_info()[1]
        if not self._failed and isinstance(error, OSError):
            sys.stderr.write(f"{self.baseFilename}: log lines are being lost: {error}\n")
        elif not isinstance(error, OSError):
            super().handleError(record)
        self._failed = True


class _Terminal(logging.Handler):
    """One line a record on stderr, above a progress bar where there is one."""

    def __init__(self, rank: int, file: Path) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.ERROR)
        # A loader worker does not know of its rank's progress bar: it clears the line.
        is_worker = multiprocessing.parent_process() is not None
        self._begin = "\r\x1b[K" if is_worker and sys.stderr.isatty() else ""
        self.setFormatter(_OneLine(rank, file))

    def filter(self, record: logging.LogRecord) -> bool:
        """Ours, and whatever is an error."""
        ours = record.name == PACKAGE or record.name.startswith(PACKAGE + ".")
        return (ours or record.levelno >= logging.ERROR) and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self._begin + self.format(record), file=sys.stderr)
        except (OSError, ValueError):  # nobody listens on the other end any more
            return


def _message(record: logging.LogRecord) -> str:
    """The message of a record on one line. Line breaks of the arguments are escaped: an id must not
    look like another record."""
    arguments = record.args
    if isinstance(arguments, tuple):
        arguments = tuple(printable(a) if isinstance(a, str) else a for a in arguments)
    message = str(record.msg) % arguments if arguments else str(record.msg)
    return one_line(message) if "\n" in message else printable(without_secrets(message))


class MessageFormatter(logging.Formatter):
    """The message alone, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The message of a record; exceptions are left out."""
        return _message(record)


class _Whole(logging.Formatter):
    """Time, level, logger, process, message; further lines, of tracebacks too, are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s [%(process)d]: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record, whose first line alone begins at the margin."""
        lines = without_secrets(super().format(record)).split("\n")
        return "\n    ".join(printable(line) for line in lines)


class _OneLine(logging.Formatter):
    """Time, level unless INFO, message; of an exception its last line and where the rest is."""

    def __init__(self, rank: int, file: Path) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._rank = rank
        self._file = file

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        parts = [self.formatTime(record, self.datefmt)]
        if self._rank:
            parts.append(f"rank {self._rank}")
        if record.levelno != logging.INFO:
            parts.append(record.levelname)
        parts.append(_message(record))
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            said = one_line(error)
            parts.append(f"- {type(error).__name__}: {said} (traceback in {self._file})")
        return " ".join(parts)
