"""Fetch files of a remote or local folder, with retries and checksums."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path

from blip_scale.data.mds import FileInfo
from blip_scale.storage.locations import is_local, local_path
from blip_scale.storage.objects import DamagedFile, ObjectFolder, retried

REFUSED_TRIES = 4
"""Number of attempts for a file that the remote reports as missing or forbidden."""


class Fetcher:
    """Fetches files of one remote folder. It can be pickled."""

    def __init__(self, remote: str, retry_s: float):
        self.remote = remote
        self._retry_s = retry_s

    def fetch(
        self, name: str, target: Path, info: FileInfo | None = None, retry_s: float | None = None
    ) -> None:
        """Fetch the file `name` to `target`. The caller must lock `target` against other processes.

        Args:
            name: path relative to the remote folder.
            target: local path of the file.
            info: expected size and checksums; None compares nothing.
            retry_s: seconds of retrying; None uses the fetcher's value, 0 makes a single attempt.

        Raises:
            DamagedFile: the content differs from `info` in every attempt.
            MissingFile: the remote does not have the file.
            RemoteError: the remote still fails after `retry_s`, or forbids the file.
            OSError: the local disk is full.
        """

        def attempt() -> None:
            try:
                _remove(target)  # remove what a killed process left
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
    """Delete the file and its incomplete download (`target.fetched`)."""
    for path in target.parent.glob(f"{glob.escape(target.name)}*"):
        path.unlink(missing_ok=True)
