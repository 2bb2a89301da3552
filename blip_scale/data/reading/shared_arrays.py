"""Read-only arrays that a rank builds once and its loader workers map.

They are in a memfd that is sealed against changes. A worker opens it through the rank's /proc
entry. Nothing is copied or pickled, and a killed process leaves nothing behind. A copy on disk
saves the next process from building the arrays.

Format: one line of JSON with `version`, `meta`, `arrays` and `xxh3`, the hash of everything else.
The arrays follow, each aligned to 64 bytes. Only integers and JSON are allowed; nothing is
unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from blip_scale.storage.untrusted import parse_json

_VERSION = 1
_ALIGNMENT = 64
_LONGEST_HEADER = 1 << 20
_NONE = np.zeros(0, np.uint8)
_DTYPE = re.compile(r"[<|][iu][1248]")
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedArrays:
    """Read-only arrays by name, and `meta`, a JSON object that describes them.

    Pickling sends a reference. Other processes on this machine can use it while this one is alive.
    """

    def __init__(self, descriptor: int) -> None:
        """Map a file in this format. The object takes ownership of the descriptor.

        Raises:
            ValueError: the file is in another format.
        """
        self._file = os.fdopen(descriptor, "rb")
        if not os.fstat(descriptor).st_size:
            raise ValueError("the file is empty")
        self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        end = self._map.find(b"\n", 0, _LONGEST_HEADER)
        if end < 0:
            raise ValueError("the file does not begin with a header")
        self._data_start = _aligned(end + 1)
        header = parse_json(self._map[:end])
        if not isinstance(header, dict) or header.get("version") != _VERSION:
            raise ValueError(f"the header is not one of version {_VERSION}")
        self.meta: dict[str, Any] = header["meta"]
        self.hash: str = header["xxh3"]
        """xxh3 of `meta`, of the arrays' description in the header, and of the arrays."""
        self._listed: list[list[Any]] = header["arrays"]
        self._arrays = self._mapped()

    def __getitem__(self, name: str) -> NDArray[Any]:
        """One array; one-dimensional and read-only."""
        return self._arrays[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (os.getpid(), self._file.fileno(), self.hash)

    @classmethod
    def pack(cls, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> SharedArrays:
        """Copy one-dimensional integer arrays to shared memory."""
        listed = [[name, array.dtype.str, len(array)] for name, array in arrays.items()]
        hasher = _hasher(meta, listed)
        for array in arrays.values():
            _for_each_part(array, hasher.update)
        header = {
            "version": _VERSION, "meta": dict(meta), "arrays": listed, "xxh3": hasher.hexdigest()
        }  # fmt: skip
        line = json.dumps(header).encode() + b"\n"
        descriptor = _memory_file()
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(line + bytes(_aligned(len(line)) - len(line)))
            for array in arrays.values():
                _for_each_part(array, file.write)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return cls(descriptor)

    @classmethod
    def load(cls, path: Path, limit_bytes: int) -> SharedArrays:
        """Read a file written by `save`, copied first so that it can't change after the check.

        Args:
            path: the file.
            limit_bytes: maximum size of the file.

        Raises:
            OSError: the file is missing, or a link.
            ValueError: the file is too large, damaged, or in another format.
        """
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(source, "rb") as file:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
                raise ValueError(f"it is not a regular file of at most {limit_bytes} bytes")
            descriptor = _memory_file()
            with os.fdopen(os.dup(descriptor), "wb") as copy:
                shutil.copyfileobj(file, copy, 1 << 22)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        try:
            arrays = cls(descriptor)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the header is damaged ({error!r})") from error
        hasher = _hasher(arrays.meta, arrays._listed)
        hasher.update(memoryview(arrays._map)[arrays._data_start :])
        if hasher.hexdigest() != arrays.hash:
            raise ValueError("its content does not match the hash in the header")
        return arrays

    def save(self, path: Path) -> None:
        """Write a file for `load` atomically.

        Raises:
            OSError: the write failed.
        """
        draft = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
        try:
            # A file of this name was left by a killed process, or is a link made by another user.
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
            with draft.open("xb") as file:
                file.write(self._map)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def _mapped(self) -> dict[str, NDArray[Any]]:
        arrays, start = {}, self._data_start
        for name, dtype, length in self._listed:
            if not _DTYPE.fullmatch(dtype) or type(length) is not int or length < 0:
                raise ValueError(f"array {name!r} does not hold integers")
            size = np.dtype(dtype).itemsize * length
            if start + size > len(self._map):
                raise ValueError(f"array {name!r} ends after the file's {len(self._map)} bytes")
            arrays[name] = np.frombuffer(self._map, dtype, length, start) if length else _NONE
            start += _aligned(size)
        return arrays


@dataclass(frozen=True)
class SharedArray:
    """One of the arrays. Unlike a NumPy array, it is pickled as a reference, not as a copy."""

    arrays: SharedArrays
    name: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.arrays[self.name]
        return array if dtype is None and not copy else np.array(array, dtype)


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library can.

    glibc keeps it, so a process would hold the memory of a temporary peak forever.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def file_of(process: int, descriptor: int, access: int, content: str) -> int:
    """Open the memfd of another process on this machine, and return a new descriptor.

    Args:
        process: pid of the other process.
        descriptor: descriptor of the file in that process.
        access: os.O_RDONLY or os.O_RDWR.
        content: content of the file, for the error message.

    Raises:
        RuntimeError: the process has ended.
    """
    try:
        return os.open(f"/proc/{process}/fd/{descriptor}", access | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeError(f"process {process} no longer shares its {content} ({error})") from error


def _opened(process: int, descriptor: int, expected: str) -> SharedArrays:
    """Map the arrays of another process.

    Raises:
        RuntimeError: the process has ended, or the descriptor now holds other arrays.
    """
    file = file_of(process, descriptor, os.O_RDONLY, "arrays")
    try:
        arrays = SharedArrays(file)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"process {process} no longer shares its arrays ({error})") from error
    if arrays.hash != expected:
        raise RuntimeError(f"process {process} shares other arrays now")
    return arrays


def _hasher(meta: Mapping[str, Any], listed: list[list[Any]]) -> xxhash.xxh3_64:
    """Hash object that holds the header, to which the arrays are added."""
    return xxhash.xxh3_64(json.dumps([meta, listed]).encode())


def _memory_file() -> int:
    return os.memfd_create("blip_scale", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _for_each_part(array: NDArray[Any], take: Any) -> None:
    """Call `take` with the bytes of an array and its padding to the alignment."""
    take(np.ascontiguousarray(array).view(np.uint8))
    take(bytes(_aligned(array.nbytes) - array.nbytes))
