"""The cache folder of fetched shards: whole files only, below a size, shared by all processes.

Processes of all jobs synchronise by flock on files in the folder. The kernel releases a lock
whatever happens to its holder. A half-written file never has the name of a shard.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blip_scale.errors import RefusedInput
from blip_scale.storage import files

_SHARDS, _TARS = "shard.*.mds", "*.tar"
TAR_INDEX, FETCHED_TAR_INDEX = "tar-index", "tar-index-fetched"
"""Folders with an index of tars, made here or fetched: 1 % of their size, and never evicted."""
TAR_LIST = "tars"
"""Folder in such an index with the list of the tars."""
_COUNT_EVERY_S = 60.0
"""Shards of the cache are counted anew so often, as other jobs add and drop some."""
_MARK_EVERY_S = 30.0
"""Longest time between two marks of a shard as used."""
_FASTEST = 40e9
"""Bytes a second. Marks are set so often that a cache that is filled at a quarter of this rate
keeps the shards in the order of their use."""
_SLACK = 64
"""Eviction goes on for this part of the limit, so that it does not list the cache every time."""
_REMOTE = "remote.txt"
"""File that names the remote whose shards a folder holds."""

logger = logging.getLogger(__name__)


class ShardCache:
    """Keeps the fetched shards of a run's streams below a size by evicting the least recently used.

    The limit holds for whole shards. Those that are being fetched come on top: one for each worker
    and one for each prefetching thread. A full disk becomes the limit where none is set.
    """

    def __init__(self, folders: Sequence[Path], limit_bytes: int | None = None):
        self.folders = list(folders)
        self.limit_bytes = limit_bytes

    def admit(self, partial: Path, path: Path) -> None:
        """Give a whole file its name, after making room for it."""
        if self.limit_bytes is None:
            partial.replace(path)
            return
        with locked(self.folders[0], "room"):
            size = partial.stat().st_size
            held, counted_s = self._held()
            if held + size > self.limit_bytes:
                held, counted_s = self._drop_until(self.limit_bytes - size), time.time()
            partial.replace(path)
            self._note(held + size, counted_s)

    def shrink(self, incoming_bytes: int) -> bool:
        """Evict shards until a full disk has room for `incoming_bytes`; False if there are none."""
        with locked(self.folders[0], "room"):
            held = sum(size for _, size, _ in self._entries())
            if not held:
                return False
            if self.limit_bytes is None or self.limit_bytes > held:
                logger.warning(
                    "the disk of the cache %s is full at %.1f GB of shards: the least recently "
                    "used are evicted from now on; free some disk space, or set data.cache_limit",
                    self.folders[0],
                    held / 1e9,
                )
            self.limit_bytes = max(held - incoming_bytes, 1)
            self._drop_until(self.limit_bytes)
            self._count.unlink(missing_ok=True)
            return True

    @property
    def mark_every_s(self) -> float:
        """Time between two marks of a shard as used, by all processes together. A small cache is
        filled anew within seconds, and needs them more often."""
        limit_bytes = math.inf if self.limit_bytes is None else self.limit_bytes
        return min(_MARK_EVERY_S, limit_bytes / _FASTEST)

    @property
    def _count(self) -> Path:
        """File with the bytes of all shards, and the time when they were last counted."""
        return self.folders[0] / ".locks" / "held"

    def _held(self) -> tuple[int, float]:
        """Bytes of all shards, and when they were counted: at most once in `_COUNT_EVERY_S` by all
        processes together."""
        try:
            held, counted_s = self._count.read_text(encoding="utf-8").split()
            if 0 <= time.time() - float(counted_s) < _COUNT_EVERY_S:
                return int(held), float(counted_s)
        except (OSError, ValueError):  # not there, or damaged: it is made again
            pass
        return sum(size for _, size, _ in self._entries()), time.time()

    def _note(self, held: int, counted_s: float) -> None:
        """Keep the bytes for the next process; without them it counts."""
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with os.fdopen(os.open(self._count, flags, 0o666), "w", encoding="utf-8") as file:
                file.write(f"{held} {counted_s}")
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                self._count.unlink()

    def _drop_until(self, allowed_bytes: int) -> int:
        """Drop the least recently used shards; returns the bytes of the others."""
        entries = sorted(self._entries())
        held = sum(size for _, size, _ in entries)
        lowest = allowed_bytes - (self.limit_bytes or 0) // _SLACK
        if held <= allowed_bytes:
            return held
        for _, size, path in entries:
            if held <= allowed_bytes and held - size < lowest:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Time of the last use, bytes and path of every shard."""
        entries = []
        for path in _shards_below(self.folders):
            try:
                status = path.stat()
            except FileNotFoundError:  # a job with other streams drops shards of this folder too
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        return entries


def claim(folder: Path, remote: str) -> None:
    """Record which remote a cache folder belongs to. Shards have the same names in every set.

    Raises:
        RefusedInput: the folder holds shards of another remote.
    """
    file = folder / _REMOTE
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "remote"):
        held = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
        if held and held != remote:
            raise RefusedInput(
                f"the cache {folder} holds shards of {held}, not of {remote}: give the stream "
                f"another local (if {remote} is a copy of the same set, remove {file})"
            )
        if not held:
            files.write_whole(file, remote + "\n")


def drop_shards(folder: Path) -> None:
    """Delete every shard of a cache folder."""
    for path in _shards_below([folder]):
        path.unlink(missing_ok=True)


def _shards_below(folders: Sequence[Path]) -> Iterator[Path]:
    """Fetched shards, and tars in the caches of tar streams; indexes of tars are left out."""
    for folder in folders:
        indexes = [folder / TAR_INDEX, folder / FETCHED_TAR_INDEX]
        has_tars = any(index.is_dir() for index in indexes)
        for pattern in (_SHARDS, _TARS) if has_tars else (_SHARDS,):
            for path in folder.rglob(pattern):
                if not any(path.is_relative_to(index) for index in indexes):
                    yield path


def has_size(path: str, size: int, mark_after_s: float | None = None) -> bool:
    """Whether there is a file of `size` bytes.

    Args:
        path: the file.
        size: in bytes.
        mark_after_s: set the time of its last use, which decides what is evicted, if that time is
            so many seconds old; None: don't.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  half the time of Path.stat
        if mark_after_s is not None and not 0 <= time.time() - status.st_mtime < mark_after_s:
            os.utime(path)
    except FileNotFoundError:  # or evicted at this moment: the reader fetches it again
        return False
    return status.st_size == size


def fetched_bytes(path: Path) -> int:
    """Bytes of a file, and of its parts that are on the way, compressed ones included."""
    held = 0
    for part in path.parent.glob(f"{glob.escape(path.name)}*"):
        with contextlib.suppress(FileNotFoundError):
            held += part.stat().st_size
    return held


def make_durable(path: Path) -> None:
    """Flush a file to the disk. Renamed before that, it could be empty after a power failure."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def locked(folder: Path, name: str | int, wait: bool = True) -> Iterator[bool]:
    """Hold a lock of a folder: True inside, or False where it is taken and `wait` is not set."""
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    # Another user could put a link here. Following it would change the file that it leads to.
    descriptor = os.open(locks / str(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
