"""Locks that prevent two conversions from writing the same chunks of an output at the same time.

In a folder the lock is an flock, which the kernel releases even if its holder is killed. In a
bucket it is a small object that its holder rewrites every `_BEAT_S` seconds. An object older than
`_STALE_S` seconds is ignored.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from blip_scale.data.conversion.output import OutputFolder
from blip_scale.storage.objects import MissingFile, ObjectFolder

_NAME = re.compile(r"\.?lock-(\d+)-of-(\d+)(?:-\w+)?")
_GRACE_S = 5.0  # workers of a killed conversion take a moment to end
_BEAT_S = 20.0
_STALE_S = 120.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


@contextmanager
def held(out: OutputFolder, number: int, of: int) -> Iterator[None]:
    """Context manager that locks the chunks of part `number` of `of`.

    Raises:
        ValueError: another conversion has locked some of these chunks; the message names it.
    """
    with _held_remote(out, number, of) if out.is_remote else _held_local(out.folder, number, of):
        yield


@contextmanager
def one_at_a_time(out: OutputFolder) -> Iterator[None]:
    """Context manager that waits until no other process merges here. No wait in a bucket."""
    with ExitStack() as held_files:
        if not out.is_remote:
            path = out.folder / ".merging"
            held_files.callback(path.unlink, missing_ok=True)
            _lock(held_files.enter_context(path.open("a")), wait=True)
        yield


def _overlap(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two parts (number, of) have a chunk in common."""
    return (first[0] - second[0]) % math.gcd(first[1], second[1]) == 0


def _part_of(name: str) -> tuple[int, int] | None:
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def _holder(number: int, of: int) -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "part": f"{number}/{of}",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _refusal(location: str, content: str | bytes) -> ValueError:
    try:
        holder = json.loads(content)
        who = (
            f"process {int(holder['pid'])} on {holder['host']}, part {holder['part']}, since "
            f"{holder['since']}"
        )
    except (ValueError, KeyError, TypeError):
        who = "unknown"
    return ValueError(
        f"{location}: another conversion is writing here ({who}): wait for it, or give another OUT"
    )


@contextmanager
def _held_local(folder: Path, number: int, of: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".lock-{number}-of-{of}"
    with ExitStack() as held_files:
        file = held_files.enter_context(_claim(path))
        held_files.callback(path.unlink, missing_ok=True)
        file.truncate(0)
        file.write(json.dumps(_holder(number, of)))
        file.flush()
        for other in sorted(folder.glob(".lock-*")):
            part = _part_of(other.name)
            if other != path and part and _overlap(part, (number, of)):
                with _claim(other):  # raises if its holder is still running
                    other.unlink(missing_ok=True)
        yield


def _claim(path: Path) -> IO[str]:
    """Lock a file and return it.

    Raises:
        ValueError: another process holds it.
    """
    until = time.monotonic() + _GRACE_S
    while True:
        file = path.open("a+")
        if _lock(file, wait=False):
            try:
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    return file
            except FileNotFoundError:  # the previous holder has just removed it
                pass
        elif time.monotonic() >= until:
            file.seek(0)
            with file:
                raise _refusal(str(path.parent), file.read())
        file.close()
        time.sleep(0.1)


def _lock(file: IO[str], wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: this file system has no locks: run one conversion at a time in this folder",
            Path(file.name).parent,
        )
    return True


@contextmanager
def _held_remote(out: OutputFolder, number: int, of: int) -> Iterator[None]:
    remote = ObjectFolder(out.location)
    name = f"lock-{number}-of-{of}-{uuid.uuid4().hex[:12]}"
    content = json.dumps(_holder(number, of)).encode()
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_S):
            try:
                remote.put(name, content)
            except OSError as error:
                logger.warning("the lock %s was not renewed: %s", name, error)

    remote.entries()  # raises if the bucket does not exist; some servers would create it on a put
    remote.put(name, content)
    thread = threading.Thread(target=beat, daemon=True)
    try:
        _refuse_others(remote, name, (number, of))
        thread.start()
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()
        remote.delete([name])


def _refuse_others(remote: ObjectFolder, own_name: str, part: tuple[int, int]) -> None:
    """Raise if another conversion holds chunks of this part, and delete stale locks.

    Two conversions that start at the same moment may both be refused, but never both continue.
    """
    files = remote.entries()[0]
    now_s = files[own_name].written_s if own_name in files else time.time()  # remote's clock
    for name, info in files.items():
        other = _part_of(name)
        if name == own_name or other is None or not _overlap(other, part):
            continue
        try:
            content = remote.get(name)
        except MissingFile:  # the other conversion has just ended
            continue
        if now_s - info.written_s < _STALE_S and not _is_dead(content):
            raise _refusal(remote.url, content)
        remote.delete([name])


def _is_dead(content: bytes) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    try:
        holder = json.loads(content)
        if holder["host"] != socket.gethostname():
            return False
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return False
