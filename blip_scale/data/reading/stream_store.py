"""Samples of a stream: from the shards where they lie, or fetched from a remote into a local cache.

Processes of any jobs meet at one thing only, an flock on a file in the cache folder while a shard
is fetched, which the kernel releases whatever happens to its holder. (MosaicML's StreamingDataset
uses named shared memory and lock files, which a killed job leaves behind and two jobs fight over.)
"""

from __future__ import annotations

import logging
import os
import random
import time
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from blip_scale.config.recipe import DataRecipe, StreamRecipe
from blip_scale.data.mds import INDEX_NAME, FileInfo, Shard
from blip_scale.data.reading import cache as caching
from blip_scale.data.reading.cache import ShardCache, locked
from blip_scale.data.reading.fetching import Fetcher
from blip_scale.data.shards import read_caption_counts, read_index
from blip_scale.errors import RefusedInput
from blip_scale.storage.free_space import is_disk_full, parse_bytes
from blip_scale.storage.objects import DamagedFile, MissingFile, RemoteError

INDEX_RETRY_S = 10.0
"""So long the index is asked for before a cached one is taken."""
_TOUCH_EVERY_S = 60.0  # a shard in use tells the eviction so
_LOCKS = 256  # shards that share a lock are not fetched at the same time
_READ_ATTEMPTS = 10
_ROOM_WAIT_S = 5.0  # on a disk that holds nothing but what others are fetching right now

logger = logging.getLogger(__name__)


class CorruptSample(ValueError):
    """A sample that can't be read or decoded, in a shard that can."""


class DamagedShard(CorruptSample):
    """A shard that the remote does not have, or whose content is not what the index says, however
    often it is asked for."""


class StreamStore:
    """Random access to the samples of one stream.

    Raises, at the start and when reading, FileNotFoundError or ValueError that name the stream, the
    shard, its path and `make_with`, the command that makes the data.
    """

    def __init__(
        self,
        stream: StreamRecipe,
        make_with: str = "",
        cache: ShardCache | None = None,
        retry_s: float = DataRecipe.retry_s,
    ):
        self.name = stream.name
        self.folder = Path(os.path.expandvars(stream.local)).expanduser()
        self.remote = os.path.expandvars(stream.remote).rstrip("/") if stream.remote else None
        self.cache: ShardCache | None = None
        self._make_with = make_with
        self._touched: dict[int, float] = {}
        self._damaged: dict[int, str] = {}
        if self.remote:
            self.cache = cache or ShardCache([self.folder])
            self._fetcher = Fetcher(self.remote, retry_s)
            self._claim_cache()
            self._fetch_index()
        try:
            self.shards = read_index(self.folder)
            counts = read_caption_counts(self.folder) if stream.repeat == "captions" else None
        except FileNotFoundError as error:
            raise FileNotFoundError(self._message(str(error))) from error
        except ValueError as error:
            raise ValueError(self._message(str(error))) from error
        self.shard_samples = tuple(shard.samples for shard in self.shards)
        """Samples of each shard."""
        self._caption_ends = counts and [list(accumulate(part or [])) for part in counts]
        if not self.samples:
            raise ValueError(self._message(f"{self.folder} holds no sample"))
        if self.remote is None:
            self._check_presence()

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)

    @property
    def shard_items(self) -> tuple[int, ...]:
        """What an epoch takes of each shard: its samples or, with `repeat: captions`, captions."""
        if self._caption_ends is None:
            return self.shard_samples
        each = zip(self._caption_ends, self.shard_samples, strict=True)
        return tuple(ends[-1] if ends else samples for ends, samples in each)

    def locate(self, shard: int, item: int) -> tuple[int, int | None]:
        """The sample that an item of `shard_items` is, and which of its captions (None: any)."""
        if self._caption_ends is None:
            return item, None
        ends = self._caption_ends[shard]
        if not ends:
            return item, 0
        sample = bisect_right(ends, item)
        return sample, item - (ends[sample - 1] if sample else 0)

    def shard_bytes(self, shard: int) -> int:
        """Size of the uncompressed shard."""
        return self.shards[shard].raw_data.bytes

    def shard_name(self, shard: int) -> str:
        return self.shards[shard].raw_data.basename

    def read(self, shard: int, sample: int) -> dict[str, Any]:
        """One sample as the columns of `shards.COLUMNS`; a remote shard is fetched first.

        Raises CorruptSample where the shard is there but the sample in it can't be read, and
        DamagedShard where the remote's shard is damaged.
        """
        for _ in range(_READ_ATTEMPTS):
            self._ensure(shard)
            try:
                return self.shards[shard].read(sample)
            except FileNotFoundError:  # evicted by another process since: fetch it again
                self._touched.pop(shard, None)
            except Exception as error:  # whatever the decoder makes of damaged bytes
                raise CorruptSample(f"{type(error).__name__}: {error}") from error
        path = self._path(self.shards[shard].raw_data)
        raise FileNotFoundError(
            self._message(f"shard {path} vanishes as soon as it is fetched: raise data.cache_limit")
        )

    def prefetch(self, number: int) -> bool:
        """Fetch a shard that is not in the cache, in one attempt.

        False where that failed, or where another thread or process is fetching it.
        """
        shard = self.shards[number]
        if number in self._damaged or self._is_there(shard):
            return True
        with locked(self.folder, number % _LOCKS, wait=False) as is_mine:
            if not is_mine:
                return False
            try:
                if not self._is_there(shard):
                    self._obtain(shard, retry_s=0)
            except DamagedFile:  # it may come whole for who needs it
                return True
            except (OSError, ValueError) as error:
                logger.info("stream %s: not prefetched: %s", self.name, error)
                return False
            return True

    def is_cached(self, number: int) -> bool:
        """Whether a shard lies in the folder, whole."""
        return self._is_there(self.shards[number])

    def _path(self, info: FileInfo) -> Path:
        return self.folder / info.basename

    def _is_there(self, shard: Shard) -> bool:
        return caching.has_size(self._path(shard.raw_data), shard.raw_data.bytes)

    def _message(self, problem: str) -> str:
        mend = f"; make it with `{self._make_with}`" if self._make_with else ""
        return f"stream {self.name!r}: {problem}{mend}"

    def _check_presence(self) -> None:
        there: dict[Path, set[str]] = {}  # listed once a folder, however many shards it has
        for shard in self.shards:
            paths = [self._path(info) for info in (shard.raw_data, shard.zip_data) if info]
            folder = paths[0].parent
            if folder not in there:
                listed = os.scandir(folder) if folder.is_dir() else ()
                there[folder] = {entry.name for entry in listed}
            if not there[folder].intersection(path.name for path in paths):
                raise FileNotFoundError(
                    self._message(f"shard {paths[0]} is missing, though the index names it")
                )

    def _ensure(self, number: int) -> None:
        """See to it that the uncompressed shard lies in the folder, whole."""
        if number in self._damaged:
            raise DamagedShard(self._damaged[number])
        now = time.monotonic()
        if now - self._touched.get(number, -_TOUCH_EVERY_S) < _TOUCH_EVERY_S:
            return
        shard = self.shards[number]
        if not self._is_there(shard):
            if self.remote is None and shard.zip_data is None:
                raise self._broken(self._path(shard.raw_data), shard.raw_data)
            with locked(self.folder, number % _LOCKS):
                if not self._is_there(shard):
                    self._obtain_or_give_up(number)
        if self.remote is not None:
            caching.mark_used(self._path(shard.raw_data))
        self._touched[number] = now

    def _broken(self, path: Path, info: FileInfo) -> Exception:
        if not path.is_file():
            return FileNotFoundError(self._message(f"shard {path} is missing"))
        size = path.stat().st_size
        return ValueError(self._message(f"shard {path} is damaged: {size} bytes, not {info.bytes}"))

    def _obtain_or_give_up(self, number: int) -> None:
        try:
            self._obtain(self.shards[number])
        except (DamagedFile, FileNotFoundError, RemoteError) as error:
            is_gone = isinstance(error, MissingFile) and self._has_index()
            if not is_gone and not isinstance(error, DamagedFile):  # it is out of reach
                raise FileNotFoundError(f"stream {self.name!r}: {error}") from error
            samples = self.shard_samples[number]
            logger.warning(
                "%s", self._message(f"{error}; others stand in for its {samples} samples")
            )
            self._damaged[number] = f"{self.name}/{self.shard_name(number)}: {error}"
            raise DamagedShard(self._damaged[number]) from error

    def _has_index(self) -> bool:
        """Whether the remote still has the set."""
        part = self.folder / f"{INDEX_NAME}.check"
        with locked(self.folder, "index"):
            try:
                self._fetcher.fetch(INDEX_NAME, part, retry_s=0)
            except RemoteError:
                return False
            part.unlink()
            return True

    def _obtain(self, shard: Shard, retry_s: float | None = None) -> None:
        """Bring a shard into the folder; on a full disk, shards that are not in use make room."""
        infos = [info for info in (shard.raw_data, shard.zip_data) if info]
        give_up = time.monotonic() + (_ROOM_WAIT_S if retry_s is None else retry_s)
        while True:
            try:
                self._fill_in(shard, retry_s)
                return
            except OSError as error:
                self._make_room(error, sum(info.bytes for info in infos), give_up)

    def _make_room(self, error: OSError, incoming_bytes: int, give_up: float = 0.0) -> None:
        """Drop shards where `error` is a full disk, or leave others until the time `give_up` to
        name what they have fetched, which can be dropped then; raises where that can't help.
        """
        if not is_disk_full(error):
            raise error
        if self.cache is not None and self.cache.shrink(incoming_bytes):
            return
        if self.cache is None or time.monotonic() >= give_up:
            raise ValueError(
                f"stream {self.name!r}: the disk of {self.folder} is full ({error.strerror}), and "
                "there is no cached shard to drop: make room, or choose another folder as `local`"
            ) from error
        time.sleep(random.Random().uniform(0.05, 0.3))  # not all processes at once

    def _fill_in(self, shard: Shard, retry_s: float | None) -> None:
        path, packed = self._path(shard.raw_data), shard.zip_data
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if packed is None:
                self._fetcher.fetch(shard.raw_data.basename, partial, shard.raw_data, retry_s)
            elif self.remote is None:
                data = self._path(packed).read_bytes()
                if packed.difference(data):
                    raise self._broken(self._path(packed), packed)
                shard.decompress(data, partial)
            else:
                part = self._path(packed)
                part = part.with_name(part.name + ".part")
                try:
                    self._fetcher.fetch(packed.basename, part, packed, retry_s)
                    self._decompress(shard, part, partial)
                finally:
                    part.unlink(missing_ok=True)
            caching.make_durable(partial)
            if self.cache is not None:
                self.cache.admit(partial, path)
            else:
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _decompress(self, shard: Shard, packed: Path, partial: Path) -> None:
        try:
            shard.decompress(packed.read_bytes(), partial)
        except ValueError as error:  # the set was written wrong, or to do harm
            raise DamagedFile(f"{self.remote}/{error}") from error

    def _claim_cache(self) -> None:
        assert self.remote is not None
        try:
            caching.claim(self.folder, self.remote)
        except RefusedInput as error:
            raise RefusedInput(f"stream {self.name!r}: {error}") from error

    def _fetch_index(self) -> None:
        """Bring the remote's index; shards cached under another index are thrown away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / INDEX_NAME
        part = self.folder / f"{INDEX_NAME}.part"
        with locked(self.folder, "index"):
            retry_s = INDEX_RETRY_S if target.is_file() else None
            try:
                try:
                    self._fetcher.fetch(INDEX_NAME, part, retry_s=retry_s)
                except OSError as error:
                    self._make_room(error, 1 << 20)
                    self._fetcher.fetch(INDEX_NAME, part, retry_s=retry_s)
            except RemoteError as error:
                if not target.is_file():
                    raise FileNotFoundError(self._message(str(error))) from error
                logger.warning("stream %r: %s; its cached copy is used", self.name, error)
                return
            if target.is_file() and target.read_bytes() != part.read_bytes():
                logger.warning(
                    "stream %s: %s has changed, cached shards are dropped",
                    self.name, f"{self.remote}/{INDEX_NAME}",
                )  # fmt: skip
                caching.drop_shards(self.folder)
            part.replace(target)


def open_streams(data: DataRecipe) -> list[StreamStore]:
    """The stores of all training streams that an epoch reads, under one cache limit."""
    if not data.streams:
        raise ValueError("data.streams is empty: name at least one stream to train on")
    names = [stream.name for stream in data.streams]
    if len(set(names)) < len(names):
        raise ValueError(f"data.streams: names must differ, got {names}")
    folders = [
        Path(os.path.expandvars(stream.local)).expanduser()
        for stream in data.streams
        if stream.remote
    ]
    limit_bytes = parse_bytes(data.cache_limit) if data.cache_limit else None
    cache = ShardCache(folders, limit_bytes)
    return [StreamStore(stream, data.make_with, cache, data.retry_s) for stream in data.streams]
