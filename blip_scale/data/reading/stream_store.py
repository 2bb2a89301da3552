"""Samples of a stream, read from a local folder or fetched from a remote into a local cache.

While a shard is fetched, the processes of all jobs synchronise by flock on a file in the cache
folder. The kernel releases the lock of a killed process. (MosaicML's StreamingDataset uses named
shared memory and lock files. A killed job leaves them behind, and two jobs conflict over them.)
"""

from __future__ import annotations

import filecmp
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from blip_scale.config.recipe import DataRecipe, StreamRecipe
from blip_scale.data.mds import INDEX_NAME, FileInfo, Shard
from blip_scale.data.overlays import COLUMNS as OVERLAY_COLUMNS
from blip_scale.data.overlays import add_captions, check_overlay
from blip_scale.data.reading import cache as caching
from blip_scale.data.reading.cache import ShardCache, locked
from blip_scale.data.reading.fetching import Fetcher
from blip_scale.data.reading.seen_shards import SeenShards
from blip_scale.data.reading.shard_table import open_captions, open_shards
from blip_scale.data.reading.shared_arrays import SharedArray
from blip_scale.data.reading.slow_fetches import warned_if_slow
from blip_scale.data.shards import COLUMNS, require_captions
from blip_scale.errors import RefusedInput
from blip_scale.storage.free_space import is_disk_full
from blip_scale.storage.locations import is_local, local_path
from blip_scale.storage.objects import DamagedFile, MissingFile, RemoteError

INDEX_RETRY_S = 10.0
"""Seconds to retry fetching the index before the cached one is used."""
_LOOK_EVERY_S = 60.0  # seconds between two checks that a shard still exists
_OVERLAYS = "overlays"
"""Folder below `local` that caches the overlays of a remote."""
_LOCKS = 256  # shards that share a lock are not fetched at the same time
_READ_ATTEMPTS = 10
_MANY_SAMPLES = 1 << 20  # larger shards are compared with their file at the start
_ROOM_WAIT_S = 5.0  # when a full disk holds only shards that others are fetching

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CorruptSample(ValueError):
    """A sample can't be read or decoded, although its shard is readable."""


class DamagedShard(CorruptSample):
    """A shard is missing in the remote, or its content differs from the index in every attempt."""


class StreamStore:
    """Random access to the samples of one stream.

    The constructor and `read` raise FileNotFoundError or ValueError. The message names the stream,
    the shard, its path and `make_with`, the command that makes the data. They raise OSError if the
    disk of the cache is full.
    """

    index_name = INDEX_NAME
    """Path of the index, relative to the remote."""

    def __init__(
        self,
        stream: StreamRecipe,
        make_with: str = "",
        cache: ShardCache | None = None,
        retry_s: float = DataRecipe.retry_s,
        columns: Mapping[str, str] = COLUMNS,
    ):
        self.name = stream.name
        self.folder = Path(os.path.expandvars(stream.local)).expanduser()
        self._root = str(self.folder)
        self.remote = os.path.expandvars(stream.remote).rstrip("/") if stream.remote else None
        self.cache: ShardCache | None = None
        self._make_with = make_with
        self._damaged: dict[int, str] = {}
        if self.remote:
            self.cache = cache or ShardCache([self.folder])
            self._fetcher = Fetcher(self.remote, retry_s)
            self._claim_cache()
        captions_folder = self._prepare_index(stream, retry_s)
        try:
            self.shards = open_shards(self.index_path.parent, columns)
            by_caption = stream.repeat == "captions"
            self._captions = open_captions(captions_folder, self.shards) if by_caption else None
        except FileNotFoundError as error:
            raise FileNotFoundError(self._message(str(error))) from error
        except ValueError as error:
            raise ValueError(self._message(str(error))) from error
        self._seen = SeenShards(len(self.shards))
        self.samples = int(self.shard_samples.sum())
        """Number of samples of all shards."""
        if not self.samples:
            raise ValueError(self._message(f"{self.folder} holds no samples"))
        self.overlays = [self._overlay(place, cache, retry_s) for place in stream.overlays]
        """Sets of additional captions, with one sample at the position of each image."""
        self.caption_shares = stream.captions
        """Share of each caption role; {} uses the captions of all roles in turn."""
        self._check_roles()
        if self.remote is None:
            self._check_presence()

    @property
    def index_path(self) -> Path:
        """Path of the index of the files that hold the images."""
        return self.folder / INDEX_NAME

    def _prepare_index(self, stream: StreamRecipe, retry_s: float) -> Path:
        """Fetch the index, and return the folder whose index holds the caption counts."""
        if self.remote:
            self._fetch_index()
        return self.folder

    @property
    def roles(self) -> list[str]:
        """Caption roles, including those of overlays."""
        stores = [self, *self.overlays]
        return sorted({role for store in stores for role in store.shards.roles})

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """Number of samples of each shard."""
        return self.shards.samples

    @property
    def shard_items(self) -> NDArray[np.int64]:
        """Number of items of each shard: samples or, with `repeat: captions`, captions."""
        return self.shard_samples if self._captions is None else self._captions.items

    @property
    def shared_items(self) -> SharedArray:
        """`shard_items` in a form that is pickled as a reference to shared memory."""
        return self.shards.shared_samples if self._captions is None else self._captions.shared_items

    def locate(self, shard: int, item: int) -> tuple[int, int | None]:
        """Index of the sample of an item (see `shard_items`), and of its caption (None: any)."""
        if self._captions is None:
            return item, None
        return self._captions.locate(shard, item, int(self.shard_samples[shard]))

    def places(self, indices: Iterable[int]) -> list[tuple[int, int]]:
        """Map sample indices over all shards to tuples (shard, index in the shard)."""
        wanted = np.fromiter(indices, np.int64)
        ends = np.cumsum(self.shard_samples)
        shards = np.searchsorted(ends, wanted, side="right")
        starts = (ends - self.shard_samples)[shards]
        return list(zip(shards.tolist(), (wanted - starts).tolist(), strict=True))

    def shard_bytes(self, shard: int) -> int:
        """Size of the uncompressed shard."""
        return int(self.shards.raw_bytes[shard])

    def shard_name(self, shard: int) -> str:
        """Path of the uncompressed shard, relative to the folder."""
        return self.shards.name(shard)

    def read(self, number: int, sample: int) -> dict[str, Any]:
        """Read a sample with the columns of `shards.COLUMNS`, fetching a remote shard first.

        Raises:
            CorruptSample: the sample can't be read, although its shard is readable.
            DamagedShard: the shard in the remote is damaged or missing.
            FileNotFoundError: the shard can't be fetched, or is evicted at once.
        """
        columns = self._read(number, sample)
        more = [overlay._read(number, sample) for overlay in self.overlays]
        try:
            for captions in more:
                add_captions(columns, captions)
            require_captions(columns)
        except ValueError as error:
            raise CorruptSample(str(error)) from error
        return columns

    def _read(self, number: int, sample: int) -> dict[str, Any]:
        return self._read_from(number, lambda: self.shards.read(number, sample))

    def _read_from(self, number: int, read: Callable[[], T]) -> T:
        """Fetch a shard if necessary, and return `read()`. Raises the errors of `self.read`."""
        for _ in range(_READ_ATTEMPTS):
            self._ensure(number)
            try:
                return read()
            except FileNotFoundError:  # evicted by another process: fetch it again
                self._seen.forget(number)
            except Exception as error:  # any error of decoding damaged bytes
                raise CorruptSample(f"{type(error).__name__}: {error}") from error
        path = self.folder / self.shards.name(number)
        raise FileNotFoundError(
            self._message(
                f"shard {path} is evicted as soon as it is fetched: raise data.cache_limit"
            )
        )

    def give_up(self, number: int, problem: str) -> DamagedShard:
        """Mark a shard as damaged because no sample can be decoded. Returns the error to raise."""
        shard = f"{self.name}/{self.shard_name(number)}"
        self._damaged[number] = (
            f"{shard}: none of its samples can be decoded, for example {problem}"
        )
        return DamagedShard(self._damaged[number])

    def prefetch(self, number: int) -> bool:
        """Fetch a shard and those of its overlays unless cached, in one attempt.

        Returns:
            False if that failed, or if another thread or process is fetching it.
        """
        overlays = [overlay.prefetch(number) for overlay in self.overlays]
        return (self.remote is None or self._prefetch(number)) and all(overlays)

    @property
    def caches(self) -> list[ShardCache]:
        """Caches of the shards and of their overlays; empty if all of them are local."""
        stores: list[StreamStore] = [self, *self.overlays]
        return [store.cache for store in stores if store.cache is not None]

    def fetched_bytes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes in the cache of each shard with its overlays, int64 [shards]."""
        sizes = np.zeros(len(numbers), np.int64)
        if self.remote:
            sizes += self.shards.raw_bytes[numbers]
        for overlay in self.overlays:
            sizes += overlay.fetched_bytes(numbers)
        return sizes

    def _prefetch(self, number: int) -> bool:
        if number in self._damaged or self._has(number):
            return True
        with locked(self.folder, number % _LOCKS, wait=False) as is_locked:
            if not is_locked:
                return False
            try:
                if not self._has(number):
                    with self._warned_if_slow(number):
                        self._obtain(self.shards[number], retry_s=0)
            except DamagedFile:  # the reader makes more attempts
                return True
            except (OSError, ValueError) as error:
                logger.info("stream %s: not prefetched: %s", self.name, error)
                return False
            return True

    def is_cached(self, number: int) -> bool:
        """Return True if a shard and its overlays are complete in their folders.

        This updates their time of last use, so they stay in the cache for longer.
        """
        return bool(self.are_cached(np.array([number]))[0])

    def are_cached(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`is_cached` for many shards, [shards].

        Shards that a process of the rank has just seen are not checked again.
        """
        every_s = 0.0 if self.cache is None else self.cache.mark_every_s
        are_cached = self._seen.are_fresh(numbers, every_s)
        for place in np.flatnonzero(~are_cached).tolist():
            are_cached[place] = self._has(int(numbers[place]))
        for overlay in self.overlays:
            are_cached &= overlay.are_cached(numbers)
        return are_cached

    def _has(self, number: int) -> bool:
        """Return True if a shard is complete in the folder, and update its time of last use."""
        path = f"{self._root}/{self.shards.name(number)}"
        mark_after_s = None if self.cache is None else self.cache.mark_every_s
        has_it = caching.has_size(path, self.shard_bytes(number), mark_after_s)
        if has_it:
            self._seen.note(number)
        return has_it

    def _path(self, info: FileInfo) -> Path:
        return self.folder / info.basename

    def _message(self, problem: str) -> str:
        fix = f"; make it with `{self._make_with}`" if self._make_with else ""
        return f"stream {self.name!r}: {problem}{fix}"

    def _overlay(self, location: str, cache: ShardCache | None, retry_s: float) -> StreamStore:
        """Open an overlay of these shards. A remote one is cached below `local`."""
        expanded = os.path.expandvars(location).rstrip("/")
        name = f"{self.name}, overlay {expanded}"
        below = self.folder / _OVERLAYS / xxhash.xxh3_64_hexdigest(expanded)
        recipe = StreamRecipe(name, str(below), expanded)
        if is_local(expanded):
            recipe = StreamRecipe(name, str(local_path(expanded)))
        overlay = StreamStore(recipe, "", cache, retry_s, OVERLAY_COLUMNS)
        table, images = overlay.shards, self.shards
        try:
            check_overlay(table.overlay, table.samples, images.index_sha256, images.samples)
        except ValueError as error:
            raise ValueError(f"stream {self.name!r}: overlay {expanded}: {error}") from error
        return overlay

    def _check_roles(self) -> None:
        wanted = {role for role, share in self.caption_shares.items() if share > 0}
        missing = sorted(wanted - set(self.roles))
        if missing:
            raise ValueError(
                f"stream {self.name!r}: `captions` names the role {', '.join(missing)}, but no "
                f"caption of {self.folder} has it; its roles are {', '.join(self.roles)}"
            )

    def _check_presence(self) -> None:
        listed: dict[str, set[bytes]] = {}  # file names by folder; each folder is listed once
        for number, name in enumerate(self.shards.names()):
            if self._is_listed(name.decode(), listed):
                continue
            packed = self.shards.packed_name(number)
            if packed is None or not self._is_listed(packed, listed):
                path = self.folder / name.decode()
                raise FileNotFoundError(
                    self._message(f"shard {path} is missing, though the index names it")
                )
        # The order needs memory for every sample in the index, so a false count must be refused.
        for number in np.flatnonzero(self.shard_samples > _MANY_SAMPLES).tolist():
            info = self.shards[number].zip_data or self.shards[number].raw_data
            path = self._path(info)
            if path.is_file() and path.stat().st_size != info.bytes:
                samples = int(self.shard_samples[number])
                raise ValueError(f"{self._broken(path, info)}; the index claims {samples} samples")

    def _is_listed(self, name: str, listed: dict[str, set[bytes]]) -> bool:
        below, _, file = name.rpartition("/")
        if below not in listed:
            folder = os.fsencode(self.folder / below)
            entries = os.scandir(folder) if Path(os.fsdecode(folder)).is_dir() else ()
            listed[below] = {entry.name for entry in entries}
        return file.encode() in listed[below]

    def _ensure(self, number: int) -> None:
        """Fetch or decompress a shard unless it is complete in the folder."""
        if number in self._damaged:
            raise DamagedShard(self._damaged[number])
        if self._seen.is_fresh(number, _LOOK_EVERY_S):
            return
        if not self._has(number):
            if self.remote is None and self.shards.packed_name(number) is None:
                file = self.shards[number].raw_data
                raise self._broken(self._path(file), file)
            with self._warned_if_slow(number), locked(self.folder, number % _LOCKS):
                if not self._has(number):
                    self._obtain_or_give_up(number)
        self._seen.note(number)

    def _warned_if_slow(self, number: int) -> AbstractContextManager[None]:
        """Context manager that logs warnings while no new bytes of a shard arrive."""
        name = self.shards.name(number)
        what = f"stream {self.name!r}: shard {name} of {self.remote or self.folder}"
        return warned_if_slow(what, lambda: caching.fetched_bytes(self.folder / name))

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
            if not is_gone and not isinstance(error, DamagedFile):  # the remote can't be reached
                raise FileNotFoundError(f"stream {self.name!r}: {error}") from error
            samples = int(self.shard_samples[number])
            logger.warning(
                "%s", self._message(f"{error}; its {samples} samples are replaced by others")
            )
            self._damaged[number] = f"{self.name}/{self.shard_name(number)}: {error}"
            raise DamagedShard(self._damaged[number]) from error

    def _has_index(self) -> bool:
        """Return True if the remote still has the index."""
        part = self.index_path.with_name(f"{INDEX_NAME}.check")
        with locked(self.folder, "index"):
            try:
                self._fetcher.fetch(self.index_name, part, retry_s=0)
            except RemoteError:
                return False
            part.unlink()
            return True

    def _obtain(self, shard: Shard, retry_s: float | None = None) -> None:
        """Fetch or decompress a shard. On a full disk, evict cached shards."""
        infos = [info for info in (shard.raw_data, shard.zip_data) if info]
        give_up = time.monotonic() + (_ROOM_WAIT_S if retry_s is None else retry_s)
        while True:
            try:
                self._fill_in(shard, retry_s)
                return
            except OSError as error:
                self._make_room(error, sum(info.bytes for info in infos), give_up)

    def _make_room(self, error: OSError, incoming_bytes: int, give_up: float = 0.0) -> None:
        """On a full disk, evict cached shards. Re-raise any other error.

        If nothing can be evicted yet, wait until `give_up` (monotonic seconds) for other processes
        to finish shards that can be.
        """
        if not is_disk_full(error):
            raise error
        if self.cache is not None and self.cache.shrink(incoming_bytes):
            return
        if self.cache is None or time.monotonic() >= give_up:
            raise OSError(
                f"stream {self.name!r}: the disk of {self.folder} is full ({error.strerror}) and "
                "there is no cached shard to evict: make room, or choose another folder as `local`"
            ) from error
        time.sleep(random.Random().uniform(0.05, 0.3))  # processes must not retry in step

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
        except ValueError as error:  # a damaged or hostile set
            raise DamagedFile(f"{self.remote}/{error}") from error

    def _claim_cache(self) -> None:
        assert self.remote is not None
        try:
            caching.claim(self.folder, self.remote)
        except RefusedInput as error:
            raise RefusedInput(f"stream {self.name!r}: {error}") from error

    def _fetch_index(self) -> None:
        """Fetch the remote's index. If it has changed, delete the cached shards."""
        target = self.index_path
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{INDEX_NAME}.part")
        with locked(self.folder, "index"):
            retry_s = INDEX_RETRY_S if target.is_file() else None
            try:
                try:
                    self._fetcher.fetch(self.index_name, part, retry_s=retry_s)
                except OSError as error:
                    self._make_room(error, 1 << 20)
                    self._fetcher.fetch(self.index_name, part, retry_s=retry_s)
            except RemoteError as error:
                if not target.is_file():
                    raise FileNotFoundError(self._message(str(error))) from error
                logger.warning("stream %r: %s; using the cached copy", self.name, error)
                return
            if target.is_file() and not filecmp.cmp(target, part, shallow=False):
                logger.warning(
                    "stream %s: %s has changed; deleting cached shards",
                    self.name, f"{self.remote}/{self.index_name}",
                )  # fmt: skip
                caching.drop_shards(self.folder)
            part.replace(target)
