"""Logging: short lines on the terminal, all records in one file per rank, quiet third parties.

The terminal shows the package's messages from INFO on (rank 0) and every error (any rank), each on
one line. The rank's file also holds their tracebacks, and the warnings and messages of DeepSpeed,
torch, transformers and others, on which a user cannot act.

Ids, captions and paths come from data sets, and may contain line breaks and escape sequences. Pass
text for a terminal, a log or a page through `printable` and `without_secrets`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import logging.handlers
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from blip_scale.storage import run_folder

PACKAGE = "blip_scale"
STACKS = signal.SIGUSR2
"""Signal on which a loader worker writes the stacks of its threads, see `set_up_worker`."""
_EARLY_RECORDS = 10_000

_QUIET_ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # C++ code writes its warnings directly to stderr
    "TF_CPP_MIN_LOG_LEVEL": "2",  # TensorBoard loads TensorFlow if it is installed
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warns when a loader process is forked
}


_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)
"""Control characters, line separators, changes of text direction, and lone surrogates."""
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@?#]+@"), "***@"),
    (
        re.compile(r"(?i)(?<=[?&])(x-amz-[\w-]+|sig\w*|\w*token|\w*key)=[^&\s'\"]+"),
        r"\1=***",
    ),
)
"""Patterns of secrets in URLs (user and password, signatures), each with its replacement."""
_SECRET_VARIABLE = re.compile(
    r"(?i)(secret|token(?!iz)|password|passwd|access_key|account_key|api_?key)(?!.*(file|path)$)"
)
_SHORTEST_SECRET = 8
"""Minimum length of a secret. Shorter values (`1`, `true`) would match parts of words."""


def printable(text: str) -> str:
    r"""Escape control characters, for example a line break as `\n` and an escape as `\u001b`.

    The result has one line. JSON remains JSON with the same content.
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    return _SHORT.get(character, f"\\u{ord(character):04x}")


def without_secrets(text: str) -> str:
    """Replace credentials by ***: in URLs, and wherever the value of a secret variable occurs."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return text


def one_line(text: object) -> str:
    """Format a text or an error for a message: on one line, printable and without secrets."""
    return printable(without_secrets(" ".join(str(text).split())))


def hold_third_party_noise() -> None:
    """Hold back messages of third parties until `set_up` opens the log file.

    Call this before torch and DeepSpeed are imported, and `set_up` before DeepSpeed starts.
    """
    for variable, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.captureWarnings(True)
    root = logging.getLogger()
    if not any(isinstance(handler, _EarlyHandler) for handler in root.handlers):
        root.addHandler(_EarlyHandler())
    # DeepSpeed adds a terminal handler and warns on import, so redirect its logger before that.
    for name, kind in (("DeepSpeed", _ToRoot), ("py.warnings", _Once)):
        logger = logging.getLogger(name)
        if not any(isinstance(log_filter, kind) for log_filter in logger.filters):
            logger.addFilter(kind())


def set_up(output_dir: Path, rank: int) -> Path:
    """Send log records to the terminal, and append them to `output_dir/logs/rank_N.log`.

    A second call moves the logs to another folder.

    Args:
        output_dir: folder of the run; created if it is missing.
        rank: rank of this process among all.

    Returns:
        Path of the rank's log file.
    """
    hold_third_party_noise()
    file = output_dir / run_folder.log_of(rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    logging.getLogger(PACKAGE).setLevel(logging.DEBUG)
    before = list(root.handlers)
    for handler in before:
        if isinstance(handler, _RankFile | _Terminal):
            root.removeHandler(handler)
            handler.close()
    to_file = _RankFile(file)
    root.addHandler(to_file)
    root.addHandler(_Terminal(rank, file))
    for handler in before:
        if isinstance(handler, _EarlyHandler):
            root.removeHandler(handler)
            for record in handler.buffer:
                to_file.handle(record)
    _strip_third_party_handlers()
    threading.excepthook = _log_thread_failure
    return file


def set_up_worker(output_dir: Path, rank: int) -> None:
    """Call `set_up` in a loader worker, and handle the signal `STACKS` from now on.

    On the signal, the worker writes the stacks of its threads to the rank's log, even if it hangs.
    """
    file = set_up(output_dir, rank)
    faulthandler.register(STACKS, file=file.open("a"))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [STACKS])  # workers start with the signal blocked


@contextlib.contextmanager
def prints_to_log(name: str) -> Iterator[None]:
    """Context manager that turns lines printed to stdout into INFO records of the logger `name`."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in filter(str.strip, printed.getvalue().splitlines()):
            logging.getLogger(name).info("%s", line)


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Log an exception that ended a thread, for example TensorBoard's writer on a full disk."""
    if failure.exc_value is not None and failure.exc_type is not SystemExit:
        logging.getLogger(__name__).error(
            "thread %s ended",
            failure.thread.name if failure.thread else "?",
            exc_info=(failure.exc_type, failure.exc_value, failure.exc_traceback),
        )


def _strip_third_party_handlers() -> None:
    """Remove the terminal handlers that libraries added. The root logger has this package's."""
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
    """Filter that passes each message once: torch repeats its FutureWarnings at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if the message is new."""
        message = record.getMessage()
        if message in self._seen:
            return False
        self._seen.add(message)
        return True


class _ToRoot(logging.Filter):
    """Filter that passes the records of a logger without propagation only to root's handlers."""

    def filter(self, record: logging.LogRecord) -> bool:
        logging.getLogger().handle(record)
        return False


class _EarlyHandler(logging.handlers.BufferingHandler):
    """Handler that keeps records until the log file is open, and shows errors immediately."""

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
    """Handler of the rank's file. On a full disk, log lines are lost but the run continues."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, mode="a", encoding="utf-8")
        self.setFormatter(_Whole())
        self._failed = False

    def close(self) -> None:
        """Close the file. Lines that a full disk refused are lost."""
        with contextlib.suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Report once that lines are being lost."""
        error = sys.exc_info()[1]
        if not self._failed and isinstance(error, OSError):
            sys.stderr.write(f"{self.baseFilename}: log lines are being lost: {error}\n")
        elif not isinstance(error, OSError):
            super().handleError(record)
        self._failed = True


class _Terminal(logging.Handler):
    """Handler that writes one line per record to stderr, above the progress bar if there is one."""

    def __init__(self, rank: int, file: Path) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.ERROR)
        # A loader worker can't access its rank's progress bar, so it clears the line instead.
        is_worker = multiprocessing.parent_process() is not None
        self._begin = "\r\x1b[K" if is_worker and sys.stderr.isatty() else ""
        self.setFormatter(_OneLine(rank, file))

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for records of this package, and for all errors."""
        ours = record.name == PACKAGE or record.name.startswith(PACKAGE + ".")
        return (ours or record.levelno >= logging.ERROR) and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self._begin + self.format(record), file=sys.stderr)
        except (OSError, ValueError):  # stderr was closed
            return


def _message(record: logging.LogRecord) -> str:
    """Format the message of a record on one line.

    Line breaks in arguments are escaped, so that an id cannot look like another record.
    """
    arguments = record.args
    if isinstance(arguments, tuple):
        arguments = tuple(printable(a) if isinstance(a, str) else a for a in arguments)
    message = str(record.msg) % arguments if arguments else str(record.msg)
    return one_line(message) if "\n" in message else printable(without_secrets(message))


class MessageFormatter(logging.Formatter):
    """Formatter of the message without other fields, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the message of a record, without its exception."""
        return _message(record)


class _Whole(logging.Formatter):
    """Formatter of time, level, logger, process and message. Tracebacks are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s [%(process)d]: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Format a record so that only its first line is not indented."""
        lines = without_secrets(super().format(record)).split("\n")
        return "\n    ".join(printable(line) for line in lines)


class _OneLine(logging.Formatter):
    """Formatter of time, level (except INFO), message, and the exception with its log file."""

    def __init__(self, rank: int, file: Path) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._rank = rank
        self._file = file

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        parts = [self.formatTime(record, self.datefmt)]
        if self._rank:
            parts.append(f"rank {self._rank}")
        if record.levelno != logging.INFO:
            parts.append(record.levelname)
        parts.append(_message(record))
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            parts.append(f"- {type(error).__name__}: {one_line(error)} (traceback in {self._file})")
        return " ".join(parts)
