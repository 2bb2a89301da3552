"""Access to object storage and web servers through obstore, with one retry policy.

The scheme of a URL (`SCHEMES`) selects S3, Google Cloud Storage, Azure or HTTP. Object names are
literal: `a#b`, `a?b` and `a%20b` are three objects. On web servers, URL syntax applies to names.

obstore's threads do not survive a fork: a process that has used this module must start others with
spawn or the fork server.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore import exceptions, store

from blip_scale.storage.free_space import is_disk_full

logger = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az", "azure", "http", "https")
RETRY_S = 180.0
"""Seconds to retry a failing bucket, unless a setting says otherwise."""
FIRST_PAUSE_S = 1.0  # doubled after every attempt, with jitter
LONGEST_PAUSE_S = 30.0
DAMAGED_TRIES = 3
"""Number of attempts for a file that arrives complete but with unexpected content."""

CHUNK_BYTES = 16 << 20  # size of one request
_CONNECTIONS = 4  # connections per object
_MOST_PARTS = 10_000  # S3's limit for one multipart upload
_PART_RETRIES = 3
IDLE_S = 60
"""Timeout in seconds if no byte of a response arrives."""
REQUEST_S = 120
"""Timeout of a request in seconds, less than RETRY_S. CHUNK_BYTES then need 140 kB/s."""
_CREDENTIALS = {
    "s3": (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and S3_ENDPOINT_URL for a server that is "
        "not Amazon's; ~/.aws is read if boto3 is installed (pip install boto3); public "
        "buckets: AWS_SKIP_SIGNATURE=true"
    ),
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""Scheme -> instructions for providing credentials."""
_ENVIRONMENT = ("AWS_", "S3_", "GOOGLE_", "AZURE_")

_PASSING = re.compile(r"RequestTimeout|IncompleteBody")
"""Error codes of temporary failures that have status 400."""
_REFUSED = re.compile(
    r"status code: (40[01345]|410)\b|169\.254\.|metadata\.google|configured region"
)
"""Failures that a retry rarely fixes: an invalid or forbidden request, a missing object, or no
credentials from the cloud's metadata service."""
_NO_RIGHTS = re.compile(r"status code: 40[013]\b|169\.254\.|metadata\.google|[Cc]redential")
_STALLED = re.compile(r"error sending request|response body error|timed out")
"""Messages of requests that may have ended at a timeout."""
_TIMING = re.compile(r" in \d[\d.]*[nµm]?s\b")
_CODE = re.compile(r"<Code>(\w+)</Code>")


class RemoteError(OSError):
    """The remote still fails after all retries."""


class RefusedError(RemoteError, FileNotFoundError):
    """The remote refuses the request, for example because of a missing bucket or missing rights."""


class MissingFile(RemoteError, FileNotFoundError):
    """The remote reports that the file does not exist."""


class UnusableRemote(ValueError):
    """The URL is invalid, or there are no credentials for it."""


class DamagedFile(ValueError):
    """The content of a remote file is still unexpected after repeated downloads."""


@dataclass(frozen=True)
class ObjectInfo:
    """Size, version and time of an object, from a listing."""

    size: int
    version: str
    """ETag of the object, or the time of its last write if it has none; changes with the
    content."""
    written_s: float
    """Time of the last write by the remote's clock, in seconds since 1970."""


def retried(
    action: Callable[[], T], verb: str, location: str, retry_s: float, refused_tries: int = 1
) -> T:
    """Run `action`, retrying while it fails, and return its result.

    This is the retry policy of the whole package. The pauses between attempts double, with jitter.
    Each failed attempt is logged.

    Args:
        action: function to run.
        verb: past participle for the messages, such as "fetched" or "listed".
        location: object of the verb, for the messages.
        retry_s: seconds during which attempts may start; 0 for a single attempt.
        refused_tries: number of refusals after which to give up.

    Raises:
        DamagedFile: `action` raised it `DAMAGED_TRIES` times, or still raises it after `retry_s`.
        MissingFile, RefusedError: the remote refused `refused_tries` times, or still refuses after
            `retry_s`.
        RemoteError: any other failure that remains after `retry_s`.
        UnusableRemote: there are no credentials for the remote.
        OSError: the local disk is full.
    """
    deadline = time.monotonic() + retry_s
    failures: Counter[type[Exception]] = Counter()
    for attempt in itertools.count(1):
        began = time.monotonic()
        try:
            return action()
        except UnusableRemote:
            raise
        except Exception as error:  # from obstore, a credential provider or the operating system
            if is_disk_full(error):
                raise
            kind, problem = _kind(error), _problem(error)
            if _STALLED.search(problem) and time.monotonic() - began >= IDLE_S:
                problem += f": limits are {IDLE_S} s without a byte and {REQUEST_S} s a request"
            pause_s = min(FIRST_PAUSE_S * 2.0 ** min(attempt - 1, 30), LONGEST_PAUSE_S)
            pause_s *= random.Random().uniform(0.5, 1.0)  # processes must not retry in step
            left_s = deadline - time.monotonic()
            failures[kind] += 1
            is_last, times = left_s <= pause_s, "once" if attempt == 1 else f"{attempt} times"
            if kind is DamagedFile and (is_last or failures[kind] == DAMAGED_TRIES):
                raise DamagedFile(
                    f"{location} stays damaged, fetched {times} ({problem})"
                ) from error
            refused = failures[MissingFile] + failures[RefusedError]
            if is_last or refused == refused_tries:
                raise kind(
                    f"{location} can't be {verb}, tried {times} ({problem})"
                    f"{_advice(location, problem)}"
                ) from error
            logger.warning(
                "attempt %d for %s failed, retrying in %.1f s, for up to %.0f s more: %s",
                attempt, location, pause_s, left_s, problem,
            )  # fmt: skip
            time.sleep(pause_s)
    raise AssertionError("unreachable")


def split_url(url: str) -> tuple[str, str, str]:
    """Split a URL into scheme, bucket or host, and object name.

    Raises:
        UnusableRemote: the URL has no bucket, or an unknown scheme.
    """
    scheme, _, rest = url.partition("://")
    host, _, name = rest.partition("/")
    if scheme not in SCHEMES or not host:
        prefixes = ", ".join(f"{name}://" for name in SCHEMES)
        raise UnusableRemote(f"{url} can't be opened: expected a path, or one of {prefixes}")
    return scheme, host, name


class ObjectFolder:
    """Objects whose names begin with a URL, or files below it on a web server.

    Every call retries a failing remote for `retry_s` seconds, then raises RemoteError. A refusal
    raises RefusedError or MissingFile at once; both are FileNotFoundErrors.
    """

    def __init__(self, url: str, retry_s: float = RETRY_S) -> None:
        """Open a folder such as s3://bucket/prefix, gs://..., az://... or https://host/folder.

        The environment variables S3_ENDPOINT_URL, AWS_*, GOOGLE_* and AZURE_* configure access.

        Raises:
            UnusableRemote: the URL is invalid, or there are no credentials.
        """
        self.url = url.rstrip("/")
        self._retry_s = retry_s
        scheme, host, path = split_url(self.url)
        self.is_web = scheme.startswith("http")
        self._root = f"{scheme}://{host}"
        self._prefix = urllib.parse.unquote(path) if self.is_web else path
        self.progress = 0
        """Counter of successful requests and uploaded parts of files."""
        self._store()

    def has_any(self, folder: str) -> bool:
        """Return True if there is an object below a folder."""

        def has_object() -> bool:
            pages = obstore.list(self._store(), prefix=self._key(folder) or None, chunk_size=1)
            return any(page for page in pages)

        return self._request(has_object, "listed", folder)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Size in bytes of every object below a folder, by name relative to `url`."""
        return {name: info.size for name, info in self.files(folder).items()}

    def files(self, folder: str = "") -> dict[str, ObjectInfo]:
        """Every object below a folder, by name relative to `url`."""
        return _without_folders(self.read_files(folder, dict))

    def read_files(self, folder: str, take: Callable[[Iterator[tuple[str, ObjectInfo]]], T]) -> T:
        """Call `take` with an iterator over all objects below a folder, and return its result.

        The iterator yields (name relative to `url`, info). If the remote fails, `take` is called
        again from the start. Empty objects that mark folders are included.
        """
        key = self._key(folder)
        start = len(self._prefix) + 1 if self._prefix else 0

        def list_objects() -> T:
            pages = obstore.list(self._store(), prefix=key or None, chunk_size=1000)
            entries = (entry for page in pages for entry in page if entry["path"] != key)
            return take((entry["path"][start:], _info(entry)) for entry in entries)

        return self._request(list_objects, "listed", folder)

    def entries(self, folder: str = "") -> tuple[dict[str, ObjectInfo], list[str]]:
        """List a folder without its subfolders. A missing folder is empty.

        Returns:
            the objects in the folder and the names of its subfolders, all relative to `url`.
        """
        key = self._key(folder)
        listed = self._request(
            lambda: obstore.list_with_delimiter(self._store(), prefix=key or None), "listed", folder
        )
        folders = self._named(dict.fromkeys(listed["common_prefixes"], 0), key)
        objects = {entry["path"]: _info(entry) for entry in listed["objects"]}
        files = self._named(objects, key)
        return {name: files[name] for name in files if name not in folders}, list(folders)

    def size(self, name: str) -> int:
        """Size of an object in bytes."""
        return self.info(name).size

    def info(self, name: str) -> ObjectInfo:
        """Size and version of an object."""
        return self._request(lambda: _info(obstore.head(*self._at(name))), "found", name)

    def get(self, name: str) -> bytes:
        """Content of a small object."""
        return self._request(lambda: bytes(obstore.get(*self._at(name)).bytes()), "read", name)

    def get_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object."""
        return self._request(
            lambda: bytes(obstore.get_range(*self._at(name), start=start, end=end)), "read", name
        )

    def fetch(self, name: str, target: Path, size: int | None = None) -> None:
        """Download an object to a file, through the temporary file `target.fetched`.

        Args:
            size: expected size in bytes; None for any size.

        Raises:
            DamagedFile: the object has another size; nothing is downloaded.
        """
        stored_size = self.size(name)
        # Some web servers do not report the size before the content.
        if size is not None and stored_size != size and not self.is_web:
            raise DamagedFile(f"{stored_size} bytes, expected {size}")
        draft = target.with_name(target.name + ".fetched")
        try:
            with draft.open("wb") as file:
                for chunk in self._chunks(name, stored_size):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)

    def _chunks(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the content in order, with several requests at a time."""
        if size <= CHUNK_BYTES:
            yield self.get(name)
            return
        starts = range(0, size, CHUNK_BYTES)
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            for place in range(
                0, len(starts), _CONNECTIONS
            ):  # at most _CONNECTIONS chunks in memory
                begins = starts[place : place + _CONNECTIONS]
                ends = [min(size, start + CHUNK_BYTES) for start in begins]
                yield from threads.map(self.get_range, itertools.repeat(name), begins, ends)

    def put(self, name: str, content: Path | bytes) -> None:
        """Write an object atomically; a large one is uploaded in several parts."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        chunk = max(CHUNK_BYTES, -(-size // _MOST_PARTS))
        # obstore retries a failed part, because `retried` would send all parts again.
        retries = _PART_RETRIES if size > chunk else 0
        target, key = self._store(retries), self._key(name)
        furthest = 0

        def parts(file: Path) -> Iterator[bytes]:
            nonlocal furthest
            with file.open("rb") as stream:
                for number in itertools.count(1):
                    part = stream.read(chunk)
                    if not part:
                        return
                    yield part
                    if number > furthest:  # resent parts are not progress
                        furthest = number
                        self.progress += 1

        def put() -> None:
            source = parts(content) if isinstance(content, Path) and size > chunk else content
            obstore.put(target, key, source, chunk_size=chunk, max_concurrency=_CONNECTIONS)

        self._request(put, "written", name)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. A missing object is not an error."""
        pending = list(names)
        if not pending:
            return
        keys = [self._key(name) for name in pending]
        try:
            self._request(lambda: obstore.delete(self._store(), keys), "deleted", pending[0])
        except MissingFile:  # some storages refuse to delete a missing object
            for name in pending if len(pending) > 1 else []:
                self.delete([name])

    def _request(self, action: Callable[[], T], verb: str, name: str) -> T:
        """Run `action` on an object or folder, with retries; see `retried`."""
        result = retried(action, verb, self._location(name), self._retry_s)
        self.progress += 1
        return result

    def _location(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _key(self, name: str) -> str:
        name = urllib.parse.unquote(name) if self.is_web else name
        return "/".join(part for part in (self._prefix, name.rstrip("/")) if part)

    def _at(self, name: str) -> tuple[Any, str]:
        """Store and key of an object. The query of a web URL is part of the store."""
        path, _, query = name.partition("?") if self.is_web else (name, "", "")
        return self._store(query=query), self._key(path)

    def _store(self, retries: int = 0, query: str = "") -> Any:
        root = f"{self._root}/?{query}" if query else self._root
        environment = frozenset(
            (name, value) for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)
        )
        return _opened(root, retries, os.getpid(), environment)

    def _named(self, listed: dict[str, T], key: str) -> dict[str, T]:
        """Make listed paths relative to `url`, without the empty object that may mark `key`."""
        start = len(self._prefix) + 1 if self._prefix else 0
        return {path[start:]: info for path, info in listed.items() if path != key}


@lru_cache(maxsize=64)
def _opened(root: str, retries: int, process: int, environment: frozenset[tuple[str, str]]) -> Any:
    """Open a store. It is cached for each process and set of environment variables."""
    scheme = root.partition("://")[0]
    settings: dict[str, Any] = {}
    try:
        if scheme == "s3":
            settings = _s3_settings()
        open_store = store.HTTPStore.from_url if scheme.startswith("http") else store.from_url
        return open_store(
            root,
            client_options={
                "allow_http": True,  # self-hosted servers often have no TLS
                "connect_timeout": "10s",
                "read_timeout": f"{IDLE_S}s",
                "timeout": f"{REQUEST_S}s",
            },
            retry_config={"max_retries": retries},  # `retried` retries the rest, and logs it
            **settings,
        )
    except Exception as error:  # from obstore or boto3
        raise UnusableRemote(
            f"{root} can't be opened ({_problem(error)}): {_CREDENTIALS.get(scheme[:2], '')}"
        ) from error


def _s3_settings() -> dict[str, Any]:
    """Settings that obstore does not read from the environment by itself."""
    settings: dict[str, Any] = {}
    if endpoint := os.environ.get("S3_ENDPOINT_URL"):
        settings["endpoint"] = endpoint
    if not os.environ.get("AWS_SKIP_SIGNATURE"):
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider  # slow to import
        except ImportError:  # obstore reads environment variables and the cloud's metadata service
            return settings
        settings["credential_provider"] = Boto3CredentialProvider()
    return settings


def _info(entry: Mapping[str, Any]) -> ObjectInfo:
    written = entry["last_modified"]
    return ObjectInfo(entry["size"], entry.get("e_tag") or str(written), written.timestamp())


def folder_markers(empty: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the empty objects that some tools create to mark folders.

    Args:
        empty: names of the empty objects.
        names: names of all objects, read only if some are empty.
    """
    candidates = set(empty)
    markers: set[str] = set()
    for name in names if candidates else ():
        folder = name.rpartition("/")[0]
        while folder and folder not in markers:
            if folder in candidates:
                markers.add(folder)
            folder = folder.rpartition("/")[0]
    return markers


def _without_folders(files: dict[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """Drop the objects that mark folders."""
    markers = folder_markers((name for name, info in files.items() if not info.size), files)
    return {name: info for name, info in files.items() if name not in markers}


def _kind(error: Exception) -> type[RemoteError] | type[DamagedFile]:
    """Classify the failure of an attempt."""
    if isinstance(error, RemoteError | DamagedFile):
        return type(error)
    text = str(error)
    if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in text:
        return MissingFile
    if isinstance(error, ValueError | exceptions.InvalidPathError):  # not a valid object name
        return MissingFile
    if _PASSING.search(text):
        return RemoteError
    refusals = (
        PermissionError, FileNotFoundError, exceptions.NotSupportedError,
        exceptions.PermissionDeniedError, exceptions.UnauthenticatedError,
    )  # fmt: skip
    is_refusal = isinstance(error, refusals) or _REFUSED.search(text)
    return RefusedError if is_refusal else RemoteError


def _problem(error: BaseException) -> str:
    """Describe an error in one line, without internals of the library and XML of the server."""
    if isinstance(error, RemoteError) and error.__cause__ is not None:
        return _problem(error.__cause__)
    text = str(error)
    line = (text.splitlines() or [""])[0].partition("<?xml")[0].strip().removesuffix(":")
    # Without address and duration of the request, the same failure always has the same text.
    line = _TIMING.sub("", line.rpartition("Server returned non-2xx ")[2])
    code = _CODE.search(text)
    return f"{type(error).__name__}: {line}" + (f": {code[1]}" if code else "")


def _advice(location: str, problem: str) -> str:
    """Instructions for providing credentials if they are the problem, else ""."""
    advice = _CREDENTIALS.get(location[:2], "")
    return f"; {advice}" if advice and _NO_RIGHTS.search(problem) else ""
