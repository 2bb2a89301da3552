"""Read files and list folders by location, which is a local path or a URL."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TypeVar

from blip_scale.errors import RefusedInput
from blip_scale.storage.objects import (
    CHUNK_BYTES,
    RETRY_S,
    ObjectFolder,
    ObjectInfo,
    RemoteError,
    split_url,
)

T = TypeVar("T")

_BUFFER_BYTES = 4 << 20  # buffer of a remote file


class FileTooLarge(ValueError):
    """A file larger than its reader allows."""


class NotRegularFile(RefusedInput, OSError):
    """A FIFO, device or socket instead of a regular file. Reading it may never end."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder in a listing."""

    name: str
    location: str
    is_folder: bool
    size: int
    version: str = ""
    """Modification time on a disk, ETag in a bucket; changes when the file is written."""


def join(folder: str, *parts: str) -> str:
    """Join path parts to a folder. An absolute part or a URL replaces everything before it."""
    for part in parts:
        if is_url(part) or part.startswith("/"):
            folder = part
        else:
            folder = f"{folder.rstrip('/')}/{part}" if folder else part
    return folder


def is_url(location: str) -> bool:
    """Return True if a location is a URL, including file:// URLs."""
    return "://" in location


def is_local(location: str) -> bool:
    """Return True if a location is on a local disk."""
    return not is_url(location) or location.startswith("file://")


def is_web(location: str) -> bool:
    """Return True if a location is on a web server."""
    return location.startswith(("http://", "https://"))


def local_path(location: str) -> Path:
    """Path of a local location, with ~ expanded."""
    return Path(location.removeprefix("file://")).expanduser()


def parent(location: str) -> str:
    """Folder that contains a location."""
    return location.rstrip("/").rpartition("/")[0] or ("/" if location.startswith("/") else ".")


def basename(location: str) -> str:
    """Last part of a location: the name of the file or folder."""
    return location.rstrip("/").rpartition("/")[2]


def stem(location: str) -> str:
    """Name of a file up to the first dot."""
    return basename(location).split(".")[0]


def extension(location: str) -> str:
    """Lower-case file extension without the dot, such as `jpg`."""
    return os.path.splitext(location)[1][1:].lower()  # noqa: PTH122  it may be a URL


def list_folder(location: str, deep: bool = False) -> list[Entry]:
    """List the content of a folder, sorted by location.

    Args:
        location: path or URL of the folder.
        deep: list all files below the folder instead of its own files and subfolders.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: the location is a file.
    """
    if not is_folder(location):
        raise NotADirectoryError(f"{location} is not a folder")
    if is_local(location):
        entries = _local_entries(location, deep)
    else:
        entries = _remote_entries(location, deep)
    return sorted(entries, key=lambda entry: entry.location)


def read_folder(location: str, take: Callable[[Iterator[Entry]], T]) -> T:
    """Call `take` with an iterator over all files below a folder, and return its result.

    The files are in no particular order and are not kept in memory. If a remote fails, `take` is
    called again from the start. Unlike in `list_folder`, the empty objects that mark folders are
    included. Errors are those of `list_folder`.
    """
    if not is_folder(location):
        raise NotADirectoryError(f"{location} is not a folder")
    if is_local(location):
        return take(_local_entries(location, deep=True))
    remote, name = _remote(location)
    start = len(name.rstrip("/")) + 1 if name else 0

    def taken(files: Iterator[tuple[str, ObjectInfo]]) -> T:
        return take(_remote_entry(location, file[start:], info) for file, info in files)

    return remote.read_files(name, taken)


def is_folder(location: str) -> bool:
    """Return True if a location is a folder. A location on a web server is always a file.

    Raises:
        FileNotFoundError: the location does not exist.
    """
    if is_web(location):
        return False
    if is_local(location):
        path = local_path(location)
        if not path.exists():
            raise FileNotFoundError(f"{location}: there is no such file or folder")
        return path.is_dir()
    remote, name = _remote(location)
    if remote.has_any(name) or not name:
        return True
    try:
        remote.size(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{location}: there is no such file or folder ({error})") from error
    return False


def file_size(location: str) -> int:
    """Size of a file in bytes."""
    if is_local(location):
        return local_path(location).stat().st_size
    remote, name = _remote(location)
    return remote.size(name)


def file_version(location: str) -> str:
    """Text that changes with a file: size and time of a local file, size and ETag of an object.

    It is empty for files on web servers.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_web(location):
        return ""
    if is_local(location):
        status = local_path(location).stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    remote, name = _remote(location)
    info = remote.info(name)
    return f"{info.size} {info.version}"


def open_file(location: str) -> IO[bytes]:
    """Open a file for reading; a file whose name ends in .gz is decompressed.

    Raises:
        FileNotFoundError: there is no such file.
        NotRegularFile: the path is a FIFO, a device or a socket.
    """
    if is_local(location):
        opened = _open_regular(str(local_path(location)))
        return _Unpacked(fileobj=opened) if location.endswith(".gz") else opened  # type: ignore[return-value]
    raw = io.BufferedReader(_RemoteFile(location), _BUFFER_BYTES)
    return _Unpacked(fileobj=raw) if location.endswith(".gz") else raw  # type: ignore[return-value]


def read_file(location: str, largest: int | None = None) -> bytes:
    """Read a whole file.

    Args:
        largest: maximum number of bytes; None for any.

    Raises:
        FileNotFoundError: there is no such file.
        FileTooLarge: the file has more than `largest` bytes.
        NotRegularFile: the path is a FIFO, a device or a socket.
    """
    if is_local(location):
        path = location if not is_url(location) else str(local_path(location))
        with _open_regular(path) as file:
            check_size(os.fstat(file.fileno()).st_size, largest)
            return file.read()
    remote, name = _remote(location)
    if largest is not None and not is_web(location):
        check_size(remote.size(name), largest)
    content = remote.get(name)
    check_size(len(content), largest)
    return content


def check_size(size: int, largest: int | None) -> None:
    """Raise FileTooLarge if `size` exceeds `largest` bytes; None allows any size."""
    if largest is not None and size > largest:
        raise FileTooLarge(f"{size / 1e6:.0f} MB, the limit is {largest / 1e6:.0f} MB")


def _open_regular(path: str) -> IO[bytes]:
    # Without O_NONBLOCK, opening a FIFO blocks until it has a writer.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise NotRegularFile(f"{path} is a socket or a device, not a regular file") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    kind = "a FIFO" if stat.S_ISFIFO(mode) else "a device"
    raise NotRegularFile(f"{path} is {kind}, not a regular file")


class _Unpacked(gzip.GzipFile):
    """A .gz file that reports all damage as gzip.BadGzipFile, which is an OSError."""

    def read(self, size: int | None = -1) -> bytes:
        with _damage_named():
            return super().read(size)

    def read1(self, size: int = -1) -> bytes:
        with _damage_named():
            return super().read1(size)

    def peek(self, n: int = -1) -> bytes:
        with _damage_named():
            return super().peek(n)

    def readline(self, size: int | None = -1) -> bytes:
        with _damage_named():
            return super().readline(size)


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    """Context manager that turns errors of damaged data into gzip.BadGzipFile."""
    try:
        yield
    except (zlib.error, EOFError) as error:
        raise gzip.BadGzipFile(f"damaged .gz file: {error}") from error


class _RemoteFile(io.RawIOBase):
    """Seekable remote file that is read in ranges, so a slow reader keeps no connection open."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self._remote, self._name = _remote(location)
        self._content: bytes | None = None
        self._position = self._size = 0
        try:
            self._size = self._remote.size(self._name)
        except RemoteError:
            if not is_web(location):
                raise
        if is_web(location) and self._size <= CHUNK_BYTES:
            # Some web servers do not send the size, and some do not support ranges.
            self._content = self._remote.get(self._name)
            self._size = len(self._content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        parts = []
        while part := self.read(CHUNK_BYTES):  # the base class would read 8 kB at a time
            parts.append(part)
        return b"".join(parts)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self._position
        end = min(self._size, start + min(len(buffer), CHUNK_BYTES))
        if start >= end:
            return 0
        if self._content is None:
            data = self._remote.get_range(self._name, start, end)
        else:
            data = self._content[start:end]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _remote(location: str) -> tuple[ObjectFolder, str]:
    """Bucket or host of a URL, and the object name."""
    scheme, host, name = split_url(location)
    return _opened(f"{scheme}://{host}"), name


@lru_cache(maxsize=64)
def _opened(root: str) -> ObjectFolder:
    # Lists of web images contain many dead hosts, so requests to web servers are not retried.
    return ObjectFolder(root, 0.0 if is_web(root) else RETRY_S)


def _remote_entries(location: str, deep: bool) -> Iterator[Entry]:
    remote, name = _remote(location)
    start = len(name.rstrip("/")) + 1 if name else 0
    files, folders = (remote.files(name), []) if deep else remote.entries(name)
    for file, info in files.items():
        yield _remote_entry(location, file[start:], info)
    for folder in folders:
        yield Entry(folder[start:], f"{location.rstrip('/')}/{folder[start:]}", True, 0)


def _remote_entry(location: str, name: str, info: ObjectInfo) -> Entry:
    return Entry(name, f"{location.rstrip('/')}/{name}", False, info.size, info.version)


def _local_entries(location: str, deep: bool) -> Iterator[Entry]:
    """List a local folder, following links. Each folder is listed only once."""
    seen: set[tuple[int, int]] = set()
    waiting = [("", str(local_path(location)))]
    while waiting:
        inner, folder = waiting.pop()
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        below: list[tuple[bool, str, str]] = []
        with os.scandir(folder) as listed:
            for item in listed:
                name, is_dir = inner + item.name, item.is_dir()
                if is_dir and deep:
                    below.append((not item.is_symlink(), item.name, item.path))
                    continue
                size, version = 0, ""
                if item.is_file():
                    size, version = item.stat().st_size, str(item.stat().st_mtime_ns)
                yield Entry(name, f"{location.rstrip('/')}/{name}", is_dir, size, version)
        # Folders are listed before links to them, so a folder always gets the same name.
        waiting += [(f"{inner}{name}/", path) for _, name, path in sorted(below)]
