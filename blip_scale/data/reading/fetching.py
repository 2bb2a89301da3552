"""Files of a remote folder, fetched with patience and checked: MosaicML Streaming's downloaders."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
from pathlib import Path

from streaming.base.format.base.reader import FileInfo
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader

from blip_scale.data.reading.cache import is_disk_full
from blip_scale.data.shards import HASH

ATTEMPT_TIMEOUT_S = 60.0
FIRST_PAUSE_S = 1.0  # doubled after every attempt, with jitter
LONGEST_PAUSE_S = 30.0
REFUSED_ATTEMPTS = 4
"""So often is a file asked for that the remote says is not there, or is forbidden."""
DAMAGED_ATTEMPTS = 3
"""So often is a file fetched that arrives whole but with other content than the index says."""

_MISSING = {"404", "NoSuchKey"}
_REFUSALS = _MISSING | {
    "403", "AccessDenied", "InvalidAccessKeyId", "NoSuchBucket", "SignatureDoesNotMatch",
}  # fmt: skip

logger = logging.getLogger(__name__)


class DamagedFile(ValueError):
    """A remote file whose content is not what the index says, however often it is fetched."""


class MissingFile(FileNotFoundError):
    """A file that the remote says it does not have, however often it is asked."""


class Fetcher:
    """Brings files of one remote folder."""

    def __init__(self, remote: str, retry_s: float, label: str):
        self.remote = remote
        self._retry_s = retry_s
        self._label = label  # begins every line of the log
        # A downloader's connections belong to one thread of one process.
        self._downloaders: dict[tuple[int, int], CloudDownloader] = {}

    def fetch(
        self, name: str, target: Path, info: FileInfo | None = None, retry_s: float | None = None
    ) -> None:
        """Bring the file `name` to `target`, complete and with the checksum that `info` states.

        What fails is tried again for `retry_s` seconds (the fetcher's own when None; 0 for a single
        attempt). Only one thread of all processes may fetch to a target at a time.

        Raises:
            DamagedFile: the content stays other than `info` says.
            MissingFile: it is not there.
            FileNotFoundError: it could not be had in time, or is forbidden.
            OSError: no room for it here.
        """
        deadline = time.monotonic() + (self._retry_s if retry_s is None else retry_s)
        source, refused, missing, damaged = f"{self.remote}/{name}", 0, 0, 0
        for attempt in itertools.count(1):
            is_damaged = False
            try:
                self._download(source, target)
                problem = "" if info is None else _difference(target, info)
                if not problem:
                    return
                is_damaged = True
            except Exception as error:  # each kind of remote has its own; none may escape unnamed
                if is_disk_full(error):
                    _remove(target)
                    raise
                problem = f"{type(error).__name__}: {error}"
                refused += _is_refusal(error)
                missing += _is_missing(error)
            _remove(target)
            pause_s = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S)
            pause_s *= random.Random().uniform(0.5, 1.0)  # not all processes at once
            left_s = deadline - time.monotonic()
            damaged += is_damaged
            if damaged == DAMAGED_ATTEMPTS or (is_damaged and left_s <= pause_s):
                raise DamagedFile(f"{source} stays damaged, fetched {attempt} times ({problem})")
            if refused == REFUSED_ATTEMPTS or left_s <= pause_s:
                kind = MissingFile if missing == attempt else FileNotFoundError
                raise kind(f"{source} can't be fetched, tried {attempt} times ({problem})")
            logger.warning(
                "%s: attempt %d for %s failed, again in %.1f s, for up to %.0f s more: %s",
                self._label, attempt, source, pause_s, left_s, problem,
            )  # fmt: skip
            time.sleep(pause_s)

    def close(self) -> None:
        """Drop the connections, which must not be shared with processes that are forked later."""
        for downloader in self._downloaders.values():
            downloader.clean_up()
        self._downloaders.clear()

    def _download(self, source: str, target: Path) -> None:
        _remove(target)  # what a killed process left
        own = (os.getpid(), threading.get_ident())
        if own not in self._downloaders:
            self._downloaders[own] = CloudDownloader.get(self.remote)
        self._downloaders[own].download(source, str(target), ATTEMPT_TIMEOUT_S)


def is_intact(data: bytes, info: FileInfo) -> bool:
    """Whether data has the size and the checksum that the index states."""
    expected = info.hashes.get(HASH)
    return len(data) == info.bytes and (expected is None or get_hash(HASH, data) == expected)


def _difference(path: Path, info: FileInfo) -> str:
    """How a file differs from what the index states; empty if it doesn't."""
    data = path.read_bytes()
    if is_intact(data, info):
        return ""
    if len(data) != info.bytes:
        return f"{len(data)} bytes, the index says {info.bytes}"
    return f"{len(data)} bytes with a wrong checksum"


def _remove(target: Path) -> None:
    """The file and what downloaders write on the way to it (`target.tmp`, `target.1a2b3c4d`)."""
    for path in target.parent.glob(f"{target.name}*"):
        path.unlink(missing_ok=True)


def _is_refusal(error: Exception) -> bool:
    """Whether trying again is of little use: not there, or not allowed."""
    return (
        _is_missing(error)
        or isinstance(error, PermissionError)
        or _code(error) in _REFUSALS
        or type(error).__name__ in ("NoCredentialsError", "Forbidden")
    )


def _is_missing(error: Exception) -> bool:
    return (
        isinstance(error, FileNotFoundError)
        or _code(error) in _MISSING
        or type(error).__name__ == "NotFound"  # Google's
    )


def _code(error: Exception) -> str:
    """What an S3 server says is wrong; "" for other errors."""
    answer = getattr(error, "response", None)  # botocore's
    return str(answer.get("Error", {}).get("Code")) if isinstance(answer, dict) else ""
