"""Cache folder of fetched shards, with a size limit, shared by all processes of all jobs.

Processes synchronise by flock on files in the folder. The kernel releases the lock of a process
that is killed. A file gets the name of a shard only when it is complete.
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
"""Folders with an index of tars, built here or fetched. It has 1 % of their size, and is never
evicted."""
TAR_LIST = "tars"
"""Folder in such an index that holds the list of tars."""
_COUNT_EVERY_S = 60.0
"""Seconds between two counts of the cached bytes, because other jobs add and evict shards."""
_MARK_EVERY_S = 30.0
"""Maximum seconds between two updates of a shard's time of last use."""
_FASTEST = 40e9
"""Bytes per second. Times of last use are updated so often that eviction is in order of use if the
cache is filled at up to a quarter of this rate."""
_SLACK = 64
"""Eviction frees limit / 64 bytes more than needed, so it does not list the cache every time."""
_REMOTE = "remote.txt"
"""File with the URL of the remote whose shards a folder holds."""

logger = logging.getLogger(__name__)


class ShardCache:
    """Limits the size of a run's fetched shards by evicting the least recently used.

    The limit applies to complete shards. Shards being fetched need additional space: one for each
    worker and one for each prefetching thread. Without a limit, eviction starts when the disk is
    full.
    """

    def __init__(self, folders: Sequence[Path], limit_bytes: int | None = None):
        self.folders = list(folders)
        self.limit_bytes = limit_bytes

    def admit(self, partial: Path, path: Path) -> None:
        """Rename a complete file to its final name, after making room for it."""
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
        """Evict shards of a full disk to make room for `incoming_bytes`.

        Returns:
            False if there is no shard to evict.
        """
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
        """Seconds between two updates of a shard's time of last use, over all processes.

        The interval is shorter for a small cache, which is refilled within seconds.
        """
        limit_bytes = math.inf if self.limit_bytes is None else self.limit_bytes
        return min(_MARK_EVERY_S, limit_bytes / _FASTEST)

    @property
    def _count(self) -> Path:
        """File with the bytes of all shards and the time of their last count."""
        return self.folders[0] / ".locks" / "held"

    def _held(self) -> tuple[int, float]:
        """Bytes of all shards, and the time of their last count.

        All processes together count at most once in `_COUNT_EVERY_S` seconds.
        """
        try:
            held, counted_s = self._count.read_text(encoding="utf-8").split()
            if 0 <= time.time() - float(counted_s) < _COUNT_EVERY_S:
                return int(held), float(counted_s)
        except (OSError, ValueError):  # missing or damaged: count again
            pass
        return sum(size for _, size, _ in self._entries()), time.time()

    def _note(self, held: int, counted_s: float) -> None:
        """Save the bytes for the next process, which counts the shards if they are missing."""
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with os.fdopen(os.open(self._count, flags, 0o666), "w", encoding="utf-8") as file:
                file.write(f"{held} {counted_s}")
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                self._count.unlink()

    def _drop_until(self, allowed_bytes: int) -> int:
        """Evict the least recently used shards, and return the bytes of the remaining ones."""
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
            except FileNotFoundError:  # another job may evict shards of this folder
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        return entries


def claim(folder: Path, remote: str) -> None:
    """Record the remote of a cache folder, because shards have the same names in every set.

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
    """Fetched shards, and tars in the caches of tar streams, without the indexes of tars."""
    for folder in folders:
        indexes = [folder / TAR_INDEX, folder / FETCHED_TAR_INDEX]
        has_tars = any(index.is_dir() for index in indexes)
        for pattern in (_SHARDS, _TARS) if has_tars else (_SHARDS,):
            for path in folder.rglob(pattern):
                if not any(path.is_relative_to(index) for index in indexes):
                    yield path


def has_size(path: str, size: int, mark_after_s: float | None = None) -> bool:
    """Return True if there is a file of `size` bytes.

    Args:
        path: the file.
        size: expected size in bytes.
        mark_after_s: update the time of last use if it is at least this many seconds old. Eviction
            is in order of this time. None never updates it.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  half the time of Path.stat
        if mark_after_s is not None and not 0 <= time.time() - status.st_mtime < mark_after_s:
            os.utime(path)
    except FileNotFoundError:  # or just evicted; the reader fetches it again
        return False
    return status.st_size == size


def fetched_bytes(path: Path) -> int:
    """Bytes of a file and of its incomplete downloads, including compressed ones."""
    held = 0
    for part in path.parent.glob(f"{glob.escape(path.name)}*"):
        with contextlib.suppress(FileNotFoundError):
            held += part.stat().st_size
    return held


def make_durable(path: Path) -> None:
    """Sync a file to the disk. Without this, a renamed file may be empty after a power failure."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def locked(folder: Path, name: str | int, wait: bool = True) -> Iterator[bool]:
    """Context manager that holds a lock of a folder.

    It yields False if another process holds the lock and `wait` is False, else True.
    """
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    # O_NOFOLLOW: another user could put a link here, and its target would be changed.
    descriptor = os.open(locks / str(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
