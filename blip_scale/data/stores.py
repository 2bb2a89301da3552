"""Samples of a stream: from the shards where they lie, or fetched from a remote into a local cache.

The formats, decompression and remotes are MosaicML Streaming's. Its StreamingDataset is not used:
it coordinates the processes of a machine by named shared memory and lock files that a killed job
leaves behind and that two jobs fight over, and it counts ranks by variables that DeepSpeed's
launcher doesn't set. Here processes meet at one thing only, an flock on a file in the cache folder
while a shard is fetched, which the kernel releases whatever happens to its holder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streaming.base.compression import decompress
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from streaming.base.util import bytes_to_int

from blip_scale.data.shards import HASH, INDEX_NAME, read_index
from blip_scale.recipe import DataRecipe, StreamRecipe

FETCH_ATTEMPTS = 5
FETCH_TIMEOUT_S = 120.0
FIRST_BACKOFF_S = 1.0  # doubled after every attempt
_TOUCH_EVERY_S = 60.0  # a shard in use tells the eviction so

_LOCKS = 16  # so many shards are fetched at once on a machine

logger = logging.getLogger(__name__)


class CorruptSample(ValueError):
    """A sample that can't be read or decoded, in a shard that can."""


class StreamStore:
    """Random access to the samples of one stream.

    Raises, at the start and when reading, FileNotFoundError or ValueError that name the stream, the
    shard, its path and `make_with`, the command that makes the data.
    """

    def __init__(self, stream: StreamRecipe, make_with: str = "", cache: CacheLimit | None = None):
        self.name = stream.name
        self.folder = Path(os.path.expandvars(stream.local)).expanduser()
        self.remote = os.path.expandvars(stream.remote).rstrip("/") if stream.remote else None
        self._make_with = make_with
        self._cache = cache
        self._downloader: CloudDownloader | None = None
        self._touched: dict[int, float] = {}
        if self.remote:
            self._fetch_index()
        try:
            self.shards = read_index(self.folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(self._message(str(error))) from error
        except ValueError as error:
            raise ValueError(self._message(str(error))) from error
        if not self.samples:
            raise ValueError(self._message(f"{self.folder} holds no sample"))
        if self.remote is None:
            self._check_presence()

    @property
    def shard_samples(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.shards)

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)

    def read(self, shard: int, sample: int) -> dict[str, Any]:
        """One sample as the columns of `shards.COLUMNS`; a remote shard is fetched first.

        Raises CorruptSample where the shard is there but the sample in it can't be read.
        """
        for _ in range(3):
            self._ensure(shard)
            try:
                return self.shards[shard].get_item(sample)
            except FileNotFoundError:  # evicted by another process since: fetch it again
                self._touched.pop(shard, None)
            except Exception as error:  # whatever the decoder makes of damaged bytes
                raise CorruptSample(f"{type(error).__name__}: {error}") from error
        path = self._path(self.shards[shard].raw_data)
        raise FileNotFoundError(
            self._message(f"shard {path} vanishes as soon as it is fetched: raise data.cache_limit")
        )

    def shard_name(self, shard: int) -> str:
        return str(self.shards[shard].raw_data.basename)

    def _path(self, info: FileInfo) -> Path:
        return self.folder / info.basename

    def _message(self, problem: str) -> str:
        mend = f"; make it with `{self._make_with}`" if self._make_with else ""
        return f"stream {self.name!r}: {problem}{mend}"

    def _check_presence(self) -> None:
        there = {entry.name for entry in os.scandir(self.folder)}
        for shard in self.shards:
            forms = [info.basename for info in (shard.raw_data, shard.zip_data) if info]
            if not there.intersection(forms):
                raise FileNotFoundError(
                    self._message(
                        f"shard {self.folder / forms[0]} is missing, though the index names it"
                    )
                )

    def _ensure(self, number: int) -> None:
        """See to it that the uncompressed shard lies in the folder, whole."""
        now = time.monotonic()
        if now - self._touched.get(number, -_TOUCH_EVERY_S) < _TOUCH_EVERY_S:
            return
        shard = self.shards[number]
        path = self._path(shard.raw_data)
        if not _has_size(path, shard.raw_data.bytes):
            if self.remote is None and shard.zip_data is None:
                raise self._damaged(path, shard.raw_data)
            with _lock(self.folder, number % _LOCKS):
                if not _has_size(path, shard.raw_data.bytes):
                    self._obtain(shard)
        if self.remote is not None:
            _touch(path)
        self._touched[number] = now

    def _damaged(self, path: Path, info: FileInfo) -> Exception:
        if not path.is_file():
            return FileNotFoundError(self._message(f"shard {path} is missing"))
        size = path.stat().st_size
        return ValueError(self._message(f"shard {path} is damaged: {size} bytes, not {info.bytes}"))

    def _obtain(self, shard: MDSReader) -> None:
        info = shard.zip_data or shard.raw_data
        stored = self._path(info)
        data = stored.read_bytes() if stored.is_file() and shard.zip_data else b""
        if not _is_intact(data, info):
            if self.remote is None:
                raise self._damaged(stored, info)
            if self._cache is not None:
                self._cache.make_room(shard.raw_data.bytes)
            data = self._fetch(info)
        if shard.zip_data:
            data = decompress(shard.compression, data)
        _write_whole(self._path(shard.raw_data), data)

    def _fetch(self, info: FileInfo) -> bytes:
        """The verified content of a remote file, retried with back-off."""
        source = f"{self.remote}/{info.basename}"
        part = self._path(info).with_name(info.basename + ".part")
        for attempt in range(FETCH_ATTEMPTS):
            if attempt:
                time.sleep(FIRST_BACKOFF_S * 2 ** (attempt - 1))
            try:
                self._download(source, part)
                data = part.read_bytes()
                if _is_intact(data, info):
                    return data
                problem = f"{len(data)} bytes with a wrong checksum, expected {info.bytes} bytes"
            except Exception as error:  # each kind of remote has its own; none may escape unnamed
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, FileNotFoundError):
                    break
            finally:
                part.unlink(missing_ok=True)
            logger.warning(
                "stream %s: attempt %d for %s failed: %s", self.name, attempt + 1, source, problem
            )
        raise FileNotFoundError(self._message(f"shard {source} can't be fetched ({problem})"))

    def _download(self, source: str, target: Path) -> None:
        for leftover in target.parent.glob(f"{target.name}*"):  # of a killed process
            leftover.unlink(missing_ok=True)
        if self._downloader is None:
            self._downloader = CloudDownloader.get(self.remote)
        self._downloader.download(source, str(target), FETCH_TIMEOUT_S)

    def _fetch_index(self) -> None:
        """Bring the remote's index; shards cached under another index are thrown away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        source, target = f"{self.remote}/{INDEX_NAME}", self.folder / INDEX_NAME
        part = self.folder / f"{INDEX_NAME}.part"
        with _lock(self.folder, "index"):
            try:
                self._download(source, part)
            except Exception as error:  # each kind of remote has its own
                if not target.is_file():
                    raise FileNotFoundError(
                        self._message(
                            f"{source} can't be fetched ({type(error).__name__}: {error})"
                        )
                    ) from error
                logger.warning(
                    "stream %s: %s can't be reached, its cached copy is used", self.name, source
                )
                return
            if target.is_file() and target.read_bytes() != part.read_bytes():
                logger.warning(
                    "stream %s: %s has changed, cached shards are dropped", self.name, source
                )
                for path in self.folder.glob("shard.*.mds"):
                    path.unlink(missing_ok=True)
            part.replace(target)
        if self._downloader is not None:
            self._downloader.clean_up()  # its connections must not be shared with forked workers


class CacheLimit:
    """Keeps fetched shards below a size by dropping the least recently used."""

    def __init__(self, folders: Sequence[Path], limit_bytes: int):
        self._folders = list(folders)
        self._limit_bytes = limit_bytes

    def make_room(self, incoming_bytes: int) -> None:
        """Drop shards until `incoming_bytes` more fit under the limit."""
        entries = []
        for folder in self._folders:
            for path in folder.glob("shard.*.mds"):
                try:
                    status = path.stat()
                except FileNotFoundError:  # another process evicts too
                    continue
                entries.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in entries) + incoming_bytes - self._limit_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def open_streams(data: DataRecipe) -> list[StreamStore]:
    """The stores of all training streams that an epoch reads, under one cache limit."""
    if not data.streams:
        raise ValueError("data.streams is empty: name at least one stream to train on")
    names = [stream.name for stream in data.streams]
    if len(set(names)) < len(names):
        raise ValueError(f"data.streams: names must differ, got {names}")
    remote = [Path(os.path.expandvars(stream.local)) for stream in data.streams if stream.remote]
    cache = (
        CacheLimit(remote, bytes_to_int(data.cache_limit)) if data.cache_limit and remote else None
    )
    return [StreamStore(stream, data.make_with, cache) for stream in data.streams]


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _is_intact(data: bytes, info: FileInfo) -> bool:
    expected = info.hashes.get(HASH)
    return len(data) == info.bytes and (expected is None or get_hash(HASH, data) == expected)


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except FileNotFoundError:  # evicted at this very moment: reading finds out
        return


def _write_whole(path: Path, data: bytes) -> None:
    """Never a part of a shard under its name, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


@contextmanager
def _lock(folder: Path, name: str | int) -> Iterator[None]:
    """One process at a time; the kernel lets go when its holder dies."""
    with (folder / f".lock-{name}").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
