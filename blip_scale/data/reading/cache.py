"""The cache folder of fetched shards: whole files only, below a size, shared by any processes.

Processes of any jobs meet at flocks on files in the folder, which the kernel releases whatever
happens to their holder; a half-written file never has the name of a shard.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blip_scale.errors import RefusedInput
from blip_scale.storage import files

_SHARDS = "shard.*.mds"
_REMOTE = "remote.txt"
"""The remote whose shards a folder holds."""

logger = logging.getLogger(__name__)


class ShardCache:
    """Keeps the fetched shards of a run's streams below a size: the least recently used go first.

    The limit holds for whole shards; those that are being fetched come on top, one a worker and one
    a prefetching thread. A full disk becomes the limit where none is set.
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
            self._drop_until(self.limit_bytes - partial.stat().st_size)
            partial.replace(path)

    def shrink(self, incoming_bytes: int) -> bool:
        """Make room for `incoming_bytes` on a full disk; False when nothing is left to drop."""
        with locked(self.folders[0], "room"):
            held = sum(size for _, size, _ in self._entries())
            if not held:
                return False
            if self.limit_bytes is None or self.limit_bytes > held:
                logger.warning(
                    "the disk of the cache %s is full at %.1f GB of shards: the least recently "
                    "used are dropped from now on; make room, or set data.cache_limit",
                    self.folders[0],
                    held / 1e9,
                )
            self.limit_bytes = max(held - incoming_bytes, 1)
            self._drop_until(self.limit_bytes)
            return True

    def _drop_until(self, allowed_bytes: int) -> None:
        entries = self._entries()
        excess = sum(size for _, size, _ in entries) - allowed_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Time of the last use, bytes and path of every shard."""
        entries = []
        for path in (path for folder in self.folders for path in folder.rglob(_SHARDS)):
            try:
                status = path.stat()
            except FileNotFoundError:  # a job with other streams drops shards of this folder too
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        return entries


def claim(folder: Path, remote: str) -> None:
    """Record whose shards a cache folder holds; names of shards are the same in every set.

    Raises:
        RefusedInput: it holds those of another remote.
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
    """Throw away every shard of a cache folder."""
    for path in folder.rglob(_SHARDS):
        path.unlink(missing_ok=True)


def has_size(path: Path, size: int) -> bool:
    """Whether `path` is a file of `size` bytes."""
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def mark_used(path: Path) -> None:
    """Tell the eviction that a shard is in use."""
    try:
        os.utime(path)
    except FileNotFoundError:  # evicted at this very moment: reading finds out
        return


def make_durable(path: Path) -> None:
    """Have a file on the disk before it gets its name: else a power failure could empty it."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def locked(folder: Path, name: str | int, wait: bool = True) -> Iterator[bool]:
    """One process and thread at a time; False, without the lock, when it is taken and `wait` is not
    set.
    """
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    # A lock that is a link of somebody else's would empty the file that it leads to.
    descriptor = os.open(locks / str(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
