"""Reading from paths and URLs alike, through fsspec; local paths stay plain paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec


@dataclass(frozen=True)
class Entry:
    """A file or folder that was listed."""

    name: str
    location: str
    is_folder: bool
    size: int


def join(folder: str, *parts: str) -> str:
    """The location of something in a folder; a part that is absolute or a URL stands for itself."""
    for part in parts:
        if is_url(part) or part.startswith("/"):
            folder = part
        else:
            folder = f"{folder.rstrip('/')}/{part}" if folder else part
    return folder


def is_url(location: str) -> bool:
    return "://" in location


def is_local(location: str) -> bool:
    return not is_url(location) or location.startswith("file://")


def parent(location: str) -> str:
    return location.rstrip("/").rpartition("/")[0] or ("/" if location.startswith("/") else ".")


def basename(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


def stem(location: str) -> str:
    return basename(location).split(".")[0]


def extension(location: str) -> str:
    """Lower case without the dot: `jpg`."""
    return os.path.splitext(location)[1][1:].lower()  # noqa: PTH122  it may be a URL


def list_folder(location: str, deep: bool = False) -> list[Entry]:
    """What lies in a folder, sorted by location; `deep`: all files below it.

    Raises FileNotFoundError where there is no such folder, NotADirectoryError for a file.
    """
    if not is_folder(location):
        raise NotADirectoryError(f"{location} is no folder")
    filesystem, path = _filesystem(location)
    with named_errors(location):
        if deep:
            listed = list(filesystem.find(path, detail=True).values())
        else:
            listed = filesystem.ls(path, detail=True)
    entries = [_entry(location, path, info) for info in listed]
    return sorted((e for e in entries if e.name), key=lambda entry: entry.location)


def is_folder(location: str) -> bool:
    """Raises FileNotFoundError where there is nothing at all."""
    filesystem, path = _filesystem(location)
    with named_errors(location):
        if not filesystem.exists(path):
            raise FileNotFoundError(f"{location}: there is no such file or folder")
        return bool(filesystem.isdir(path))


def file_size(location: str) -> int:
    filesystem, path = _filesystem(location)
    with named_errors(location):
        return int(filesystem.size(path) or 0)


def open_file(location: str) -> IO[bytes]:
    """For reading; a file that ends in .gz is unpacked."""
    filesystem, path = _filesystem(location)
    compression = "gzip" if location.endswith(".gz") else None
    with named_errors(location):
        return fsspec.core.OpenFile(filesystem, path, "rb", compression).open()


def read_file(location: str) -> bytes:
    """Raises FileNotFoundError where there is no such file."""
    if not is_url(location):
        with open(location, "rb") as file:  # noqa: PTH123  the quick way for millions of images
            return file.read()
    filesystem, path = _filesystem(location)
    with named_errors(location):
        return bytes(filesystem.cat_file(path))


def remove_files(locations: Sequence[str]) -> None:
    """Remove files of the same remote."""
    for location in locations:
        filesystem, path = _filesystem(location)
        with named_errors(location):
            filesystem.rm_file(path)


@contextmanager
def named_errors(location: str) -> Iterator[None]:
    """Each kind of remote has errors of its own; all become an OSError that says where."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        if not is_url(location):
            raise
        said = (str(error).splitlines() or [""])[0]
        raise OSError(f"{location}: {type(error).__name__}: {said}") from error


def _filesystem(location: str) -> tuple[Any, str]:
    """A local file system, or that of a URL's protocol."""
    if location.startswith("s3://"):
        from obstore.fsspec import FsspecStore  # s3fs wants another botocore than streaming does

        endpoint = os.environ.get("S3_ENDPOINT_URL")
        settings: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        store = FsspecStore("s3", client_options={"allow_http": True}, **settings)
        return store, location.removeprefix("s3://")
    try:
        return fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:  # a protocol without its package, or unknown
        raise ValueError(f"{location} can't be opened: {error}") from error


def _entry(location: str, root: str, info: dict[str, Any]) -> Entry:
    inside = info["name"].rstrip("/").removeprefix(root.rstrip("/")).lstrip("/")
    return Entry(
        inside, join(location, inside), info["type"] == "directory", int(info["size"] or 0)
    )
