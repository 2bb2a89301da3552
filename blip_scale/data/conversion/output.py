"""Output of a conversion, in a local folder or object storage."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from blip_scale.storage.locations import is_local, local_path
from blip_scale.storage.objects import MissingFile, ObjectFolder
from blip_scale.storage.output_files import naming_full_disk

_CONNECTIONS = 8
_AT_HAND = 64  # files in memory at a time

logger = logging.getLogger(__name__)


class OutputFolder:
    """Folder in which files appear atomically. A name may begin with one folder."""

    def __init__(self, location: str, scratch: str | None = None):
        """Open an output.

        Args:
            location: folder or remote.
            scratch: folder for temporary files of a remote output (default: the system's).

        Raises:
            ValueError: the remote can't be opened.
        """
        self.location = location.rstrip("/")
        self.is_remote = not is_local(location)
        self.folder = local_path(location)
        self._scratch = scratch
        if self.is_remote:
            self._remote = ObjectFolder(self.location)

    @contextmanager
    def workshop(self, name: str, per_process: bool = False) -> Iterator[Path]:
        """Context manager for an empty temporary folder, in which files are made before `put`.

        Files that a killed run left in a folder of the same name are removed.

        Args:
            name: name of the folder. Use the same name for the same work.
            per_process: add host and process id to the name, if several processes may do the work.
        """
        if per_process:
            name = f"{name}-{socket.gethostname()}-{os.getpid()}"
        parent = Path(self._scratch or tempfile.gettempdir()) if self.is_remote else self.folder
        stamp = "".join(c if c.isalnum() else "-" for c in self.location) if self.is_remote else ""
        stamp = f"{os.geteuid()}{stamp[-80:]}" if stamp else ""
        folder = parent / f".making-{stamp}{name}"
        shutil.rmtree(folder, ignore_errors=True)
        parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700 if self.is_remote else 0o777)  # fails if another user has it
        try:
            with naming_full_disk(parent):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Move files from a workshop folder to the output, in this order.

        The presence of the last file shows that all files are complete.
        """
        for name in names:
            if self.is_remote:
                self._remote.put(name, folder / name)
            else:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).replace(self.folder / name)

    def has(self, name: str) -> bool:
        """Whether the output has a file."""
        if not self.is_remote:
            return (self.folder / name).is_file()
        try:
            self._remote.size(name)
        except MissingFile:
            return False
        return True

    def names(self, folder: str = "") -> set[str]:
        """Return the names of the files at the top level, or in `folder` (names include it)."""
        if self.is_remote:
            return set(self._remote.entries(folder)[0])
        files = (self.folder / folder).glob("*")
        return {path.relative_to(self.folder).as_posix() for path in files}

    def fetch(self, name: str, folder: Path) -> Path:
        """Return a local path to a file. A remote file is first downloaded to `folder`."""
        if not self.is_remote:
            return self.folder / name
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._remote.fetch(name, target)
        return target

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return next(self.read_many([name]))

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield file contents in the order of `names`. Remote files are read concurrently."""
        if not self.is_remote:
            yield from ((self.folder / name).read_bytes() for name in names)
            return
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            for start in range(0, len(names), _AT_HAND):
                yield from threads.map(self._remote.get, names[start : start + _AT_HAND])

    def discard(self, names: Iterable[str]) -> None:
        """Remove files. If the remote does not allow deletion, log a warning."""
        if not self.is_remote:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            return
        try:
            self._remote.delete(sorted(names))
        except OSError as error:
            logger.warning("files that no index names stay there: %s", error)
