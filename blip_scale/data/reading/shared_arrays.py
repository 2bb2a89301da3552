"""Read-only arrays that a rank makes once and its loader workers map.

They lie in a memory file of the kernel, sealed against changes. A worker opens it through the
rank's /proc entry, so nothing is copied or pickled, and nothing is left behind by processes that
are killed. A copy on disk can spare the next process the work of making them.

The format: one line of JSON (`version`, `meta`, `arrays`, `xxh3`, the hash of everything else),
then the arrays, each at a multiple of 64 bytes. Integers and JSON only; nothing is unpickled.
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
    """Arrays by name, read-only, with `meta`, a JSON object that describes them.

    Pickling sends a reference, which other processes of this machine can use while this one lives.
    """

    def __init__(self, descriptor: int) -> None:
        """Map a file that holds the format; the descriptor belongs to this object from now on.

        Raises:
            ValueError: it holds something else.
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
        """xxh3 of `meta`, of what the header says of the arrays, and of the arrays."""
        self._listed: list[list[Any]] = header["arrays"]
        self._arrays = self._mapped()

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array, one dimension, read-only."""
        return self._arrays[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (os.getpid(), self._file.fileno(), self.hash)

    @classmethod
    def pack(cls, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> SharedArrays:
        """Put arrays of integers, each of one dimension, into memory that can be shared."""
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
        """Read a file that `save` wrote. It is copied first: what is checked is what is used.

        Args:
            path: the file.
            limit_bytes: a larger file is not read.

        Raises:
            OSError: it is not there, or a link.
            ValueError: it holds something else, or was damaged.
        """
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(source, "rb") as file:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
                raise ValueError(f"it is no file of at most {limit_bytes} bytes")
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
            raise ValueError("the content does not have the hash in the header")
        return arrays

    def save(self, path: Path) -> None:
        """Write a file for `load`, whole or not at all.

        Raises:
            OSError: the disk does not take it.
        """
        draft = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
        try:
            # A draft of this name was left by a killed process, or is somebody's link.
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
                raise ValueError(f"array {name!r} is not one of integers")
            size = np.dtype(dtype).itemsize * length
            if start + size > len(self._map):
                raise ValueError(f"array {name!r} ends behind the file's {len(self._map)} bytes")
            arrays[name] = np.frombuffer(self._map, dtype, length, start) if length else _NONE
            start += _aligned(size)
        return arrays


@dataclass(frozen=True)
class SharedArray:
    """One of the arrays. Pickling sends a reference, where a NumPy array would be copied."""

    arrays: SharedArrays
    name: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.arrays[self.name]
        return array if dtype is None and not copy else np.array(array, dtype)


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, if the C library can. glibc keeps it, so
    that a process would hold for good what it needed for a moment."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def file_of(process: int, descriptor: int, access: int, content: str) -> int:
    """Open the memory file of another process of this machine, and return its descriptor here.

    Args:
        process: the other process.
        descriptor: descriptor of the file there.
        access: os.O_RDONLY or os.O_RDWR.
        content: what the file holds, for the error.

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
        RuntimeError: it has ended.
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
    """The hash so far, before the arrays."""
    return xxhash.xxh3_64(json.dumps([meta, listed]).encode())


def _memory_file() -> int:
    return os.memfd_create("blip_scale", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _for_each_part(array: NDArray[Any], take: Any) -> None:
    """Hand over the bytes of an array, filled up to the alignment."""
    take(np.ascontiguousarray(array).view(np.uint8))
    take(bytes(_aligned(array.nbytes) - array.nbytes))
