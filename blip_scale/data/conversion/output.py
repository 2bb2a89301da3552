"""Where shards go: a local folder, or any remote that MosaicML Streaming writes to."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streaming.base.storage import CloudDownloader, CloudUploader

from blip_scale.storage.locations import is_local, named_errors, remove_files

_ATTEMPTS = 5  # of an upload, with a doubling pause between them
_CONNECTIONS = 8
_AT_HAND = 64  # so many files are held in memory

logger = logging.getLogger(__name__)

# Says at every upload that the folder with the files to upload isn't empty.
logging.getLogger("streaming.base.storage.upload").setLevel(logging.ERROR)


class OutputFolder:
    """Files appear in it whole or not at all; names may have one folder in front."""

    def __init__(self, location: str, scratch: str | None = None):
        """`scratch`: where files are made before they go to a remote (default: the system's
        temporary folder)."""
        self.location = location.rstrip("/")
        self.is_remote = not is_local(location)
        self.folder = Path(location.removeprefix("file://")).expanduser()
        self._scratch = scratch

    @contextmanager
    def workshop(self, name: str, own: bool = False) -> Iterator[Path]:
        """An empty folder to make files in; what a killed run left under that name goes.

        `own`: no other process takes the same, whatever it makes.
        """
        if own:
            name = f"{name}-{socket.gethostname()}-{os.getpid()}"
        parent = Path(self._scratch or tempfile.gettempdir()) if self.is_remote else self.folder
        stamp = "".join(c if c.isalnum() else "-" for c in self.location) if self.is_remote else ""
        folder = parent / f".making-{stamp[-80:]}{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Move files out of a workshop, in this order: the last one says that all are there."""
        if not self.is_remote:
            for name in names:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).replace(self.folder / name)
            return
        with named_errors(self.location):
            uploader = self._uploader(folder)
            for name in names:
                uploader.upload_file(name)

    def names(self, prefix: str) -> set[str]:
        """Names of the files that start with `prefix`."""
        if not self.is_remote:
            return {
                path.relative_to(self.folder).as_posix() for path in self.folder.glob(f"{prefix}*")
            }
        root = urllib.parse.urlparse(self.location).path.strip("/")
        with named_errors(self.location), tempfile.TemporaryDirectory() as empty:
            keys = self._uploader(Path(empty)).list_objects(prefix) or []
        return {key.removeprefix(root).lstrip("/") for key in keys}

    def fetch(self, name: str, folder: Path) -> Path:
        """A copy of a file, or the file itself where it is at hand."""
        if not self.is_remote:
            return self.folder / name
        target = folder / name
        with named_errors(self.location):
            CloudDownloader.direct_download(f"{self.location}/{name}", str(target))
        return target

    def read(self, name: str) -> bytes:
        return next(self.read_many([name]))

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        """Contents in the order of `names`; from a remote many at once."""
        if not self.is_remote:
            yield from ((self.folder / name).read_bytes() for name in names)
            return
        downloader = CloudDownloader.get(self.location)

        def download(name: str) -> bytes:
            with named_errors(self.location), tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "file"
                downloader.download(f"{self.location}/{name}", str(target))
                return target.read_bytes()

        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            for start in range(0, len(names), _AT_HAND):
                yield from threads.map(download, names[start : start + _AT_HAND])
        downloader.clean_up()

    def discard(self, names: Iterable[str]) -> None:
        """Remove files. In a remote that does not allow it, they stay, and a warning says so."""
        if not self.is_remote:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            return
        try:
            remove_files([f"{self.location}/{name}" for name in sorted(names)])
        except (OSError, ValueError) as error:
            logger.warning("%s: files that no index names stay there: %s", self.location, error)

    def _uploader(self, folder: Path) -> Any:
        return CloudUploader.get(
            (str(folder), self.location), keep_local=True, retry=_ATTEMPTS, exist_ok=True
        )
