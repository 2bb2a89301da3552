"""Files of a remote folder, which may lie on a disk too, fetched with patience and checked."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path

from blip_scale.data.mds import FileInfo
from blip_scale.storage.locations import is_local, local_path
from blip_scale.storage.objects import DamagedFile, ObjectFolder, retried

REFUSED_TRIES = 4
"""How often a file is asked for that the remote says is not there, or is forbidden."""


class Fetcher:
    """Brings files of one remote folder; it may be sent to other processes."""

    def __init__(self, remote: str, retry_s: float):
        self.remote = remote
        self._retry_s = retry_s

    def fetch(
        self, name: str, target: Path, info: FileInfo | None = None, retry_s: float | None = None
    ) -> None:
        """Bring the file `name` to `target`, complete and with the checksums that `info` states.

        What fails is retried for `retry_s` seconds (the fetcher's own when None; 0 for a single
        attempt). Only one thread of all processes may fetch to a target at a time.

        Raises:
            DamagedFile: the content stays other than `info` says.
            MissingFile: it is not there.
            RemoteError: it could not be had in time, or is forbidden.
            OSError: no room for it here.
        """

        def attempt() -> None:
            try:
                _remove(target)  # what a killed process left
                self._download(name, target, info)
                problem = "" if info is None else info.difference(target.read_bytes())
                if problem:
                    raise DamagedFile(problem)
            except BaseException:
                _remove(target)
                raise

        patience_s = self._retry_s if retry_s is None else retry_s
        retried(attempt, "fetched", f"{self.remote}/{name}", patience_s, REFUSED_TRIES)

    def _download(self, name: str, target: Path, info: FileInfo | None) -> None:
        size = None if info is None else info.bytes
        if is_local(self.remote):
            path = local_path(self.remote) / name
            if size is not None and path.stat().st_size != size:
                raise DamagedFile(f"{path.stat().st_size} bytes, the index says {size}")
            shutil.copyfile(path, target)
        else:
            ObjectFolder(self.remote, retry_s=0.0).fetch(name, target, size)


def _remove(target: Path) -> None:
    """The file, and drafts of it (`target.fetched`)."""
    for path in target.parent.glob(f"{glob.escape(target.name)}*"):
        path.unlink(missing_ok=True)
