"""Output files of commands: checks before the work, and atomic writing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blip_scale.errors import RefusedInput
from blip_scale.storage.free_space import is_disk_full

OVERWRITE_HELP = "replace an existing output file; an input is never replaced"
"""Help text of --overwrite in all commands that write a file."""
_LEAST_FREE_BYTES = 64 << 10
_NO_SPACE = os.strerror(errno.ENOSPC)


def is_stream(file: Path) -> bool:
    """Return True if a path is a device, a FIFO, or an open descriptor such as /dev/stdout.

    Such a path is written directly, because it can't be replaced by renaming.
    """
    link = str(file.readlink()) if file.is_symlink() else ""
    if link.startswith("/proc/") or str(file.parent.resolve()).startswith("/proc/"):
        return True
    return file.exists() and not file.is_file() and not file.is_dir()


def check_output(file: Path, overwrite: bool, inputs: Iterable[Path | str] = ()) -> None:
    """Refuse a file that cannot be written or must not be replaced.

    Args:
        file: output of a command.
        overwrite: whether an existing file may be replaced.
        inputs: files and folders that the command reads.

    Raises:
        RefusedInput: `file` is a folder, an input or an existing file, or its folder is a file.
    """
    if is_stream(file):
        return
    if file.is_dir():
        raise RefusedInput(f"{file} is a folder: give the name of a file")
    if not file.exists():
        ancestor = next(parent for parent in file.absolute().parents if parent.exists())
        if not ancestor.is_dir():
            raise RefusedInput(f"{file}: {ancestor} is a file, but a folder is needed")
        return
    target = file.resolve()
    for source in map(Path, inputs):
        if source.is_dir() and source.resolve() in target.parents:
            raise RefusedInput(f"{file} lies in the input {source}: give another name")
        if source.is_file() and source.samefile(file):
            raise RefusedInput(f"{file} is an input of this command: give another name")
    if not overwrite:
        raise RefusedInput(f"{file} exists: give another name, or --overwrite")


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path to write, and renames it to `file` at the end.

    Links are followed. After an error, `file` is unchanged. A killed command leaves `FILE.partial`.
    Devices and FIFOs are written directly.

    Raises:
        OSError: the disk is full. The message names the file.
    """
    if is_stream(file):
        yield file
        return
    target = file.resolve()
    draft = target.with_name(f"{target.name}.partial")
    try:
        with naming_full_disk(target):
            yield draft
            draft.replace(target)
    except Exception:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def naming_full_disk(place: Path | str) -> Iterator[None]:
    """Context manager that turns the errors of a full disk into an OSError that names the file.

    safetensors has its own error class for a full disk. torch and faiss raise a RuntimeError
    without the cause. It is converted only if the disk is full.

    Args:
        place: file or folder to be written.
    """
    try:
        yield
    except Exception as error:
        is_told = is_disk_full(error) or _NO_SPACE in str(error)
        if not is_told and not (isinstance(error, RuntimeError) and _is_full(Path(place))):
            raise
        message = (
            f"cannot write {place}: the disk is full; free some space, or write to another disk"
        )
        raise OSError(message) from error


def _is_full(place: Path) -> bool:
    """Return True if the disk of a path is full."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free < _LEAST_FREE_BYTES


def check_apart(out: Path, source: Path, may_contain: bool = False) -> None:
    """Refuse an output that is the input, contains it or is inside it, with links resolved.

    Args:
        out: output of a command.
        source: file or folder that the command reads.
        may_contain: allow an output that contains the input.

    Raises:
        RefusedInput: the output overlaps with the input.
    """
    target, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if target == origin:
        relation = "is the input"
    elif target in origin.parents and not may_contain:
        relation = f"contains the input {source}"
    elif origin in target.parents:
        relation = f"lies in the input {source}"
    else:
        return
    raise RefusedInput(f"{out} {relation}: give another OUT")
