"""A folder of an object storage: small, patient calls on top of obstore."""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore import store

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK_BYTES = 16 << 20  # of one request: it must pass within the timeout
_TIMEOUT_S = 60
_FIRST_PAUSE_S = 1.0  # doubled after every attempt, with jitter
_LONGEST_PAUSE_S = 30.0
_REFUSALS = re.compile(r"status code: 40[0134]\b")
"""Bad request, no credentials, no rights, not there: asking again would not help."""


class ObjectFolder:
    """The objects under a URL.

    Every call is tried again for `retry_s` seconds where the storage fails, and then raises
    OSError; what it refuses (no such bucket, no rights) raises FileNotFoundError at once.
    """

    def __init__(self, url: str, retry_s: float) -> None:
        """Open s3://bucket/prefix; S3_ENDPOINT_URL and boto3's credentials hold as for the data.

        Raises:
            ValueError: there are no credentials, or the URL makes no sense.
        """
        from obstore.auth.boto3 import Boto3CredentialProvider  # slow to import

        self.url = url.rstrip("/")
        self._retry_s = retry_s
        endpoint = os.environ.get("S3_ENDPOINT_URL")
        settings: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        try:
            self._store = store.from_url(
                self.url,
                client_options={"allow_http": True, "timeout": f"{_TIMEOUT_S}s"},
                retry_config={"max_retries": 0},  # the patience is ours, and said in the log
                credential_provider=Boto3CredentialProvider(),
                **settings,
            )
        except Exception as error:  # boto3, obstore: each has its own
            raise ValueError(f"checkpoint.folder {url} can't be opened: {error}") from error

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object under a folder, by name from here."""

        def listed() -> dict[str, int]:
            pages = obstore.list(self._store, prefix=prefix or None)
            return {entry["path"]: entry["size"] for page in pages for entry in page}

        return self._patiently(listed, "list", prefix)

    def put(self, name: str, content: Path | bytes) -> None:
        """Write an object, whole or not at all."""
        self._patiently(
            lambda: obstore.put(self._store, name, content, chunk_size=_CHUNK_BYTES), "write", name
        )

    def get(self, name: str) -> bytes:
        """Content of a small object."""
        return self._patiently(lambda: bytes(obstore.get(self._store, name).bytes()), "read", name)

    def fetch(self, name: str, target: Path) -> None:
        """Bring an object into a file, by way of `target.fetched`."""
        draft = target.with_name(target.name + ".fetched")
        size = self._patiently(lambda: obstore.head(self._store, name)["size"], "find", name)
        with draft.open("wb") as file:
            for start in range(0, size, _CHUNK_BYTES):
                end = min(size, start + _CHUNK_BYTES)
                file.write(self._range(name, start, end))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is none to remove."""
        doomed = list(names)
        if doomed:
            self._patiently(lambda: obstore.delete(self._store, doomed), "delete", doomed[0])

    def _range(self, name: str, start: int, end: int) -> obstore.Bytes:
        return self._patiently(
            lambda: obstore.get_range(self._store, name, start=start, end=end), "read", name
        )

    def _patiently(self, action: Callable[[], T], verb: str, name: str) -> T:
        """The result of `action`, tried for `retry_s`."""
        deadline = time.monotonic() + self._retry_s
        for number in itertools.count():
            try:
                return action()
            except Exception as error:  # obstore's own, and OSError of the network below it
                pause_s = min(_FIRST_PAUSE_S * 2**number, _LONGEST_PAUSE_S)
                pause_s *= random.Random().uniform(0.5, 1.0)  # not all ranks at once
                left_s = deadline - time.monotonic()
                said = f"can't {verb} {self.url}/{name}: {_first_line(error)}"
                if _REFUSALS.search(str(error)):
                    raise FileNotFoundError(said) from error
                if left_s <= pause_s:
                    raise OSError(f"{said} (tried {number + 1} times)") from error
                logger.warning("%s; again in %.1f s, for up to %.0f s", said, pause_s, left_s)
                time.sleep(pause_s)
        raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    """What happened, without the library's inner state on further lines."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
