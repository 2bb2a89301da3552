"""How much a disk still takes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path


def free_bytes(folder: Path) -> float:
    """Free bytes of a folder in which a file can be written; made, and removed again, if it was
    not there."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        new = [folder, *folder.parents]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
        free = float(shutil.disk_usage(folder).free)
        for made in new[: new.index(above)]:
            made.rmdir()
        return free
    except OSError as error:
        raise OSError(f"{folder} can't be written ({error.strerror}): give another") from error
