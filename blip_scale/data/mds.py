"""The MDS format of MosaicML Streaming: shards of samples, and the index.json that lists them.

A shard file holds, in little-endian byte order:

- the number of samples, uint32;
- the offset of each sample in the file and the end of the last one, uint32 each;
- the settings of the writer as JSON, which no reader needs;
- the samples. Each begins with the sizes (uint32) of its columns that have no fixed size; the
  columns follow in the order of their names.

index.json holds `version` (2) and `shards`: one entry per shard with its columns, its number of
samples, and name, size and hashes of its file, both uncompressed and compressed.

A data set is data, never code: an index whose columns need more than `ENCODINGS`, `pkl` above all,
is refused. Files are read and written without the package `streaming`; the tests compare with it.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from blip_scale.storage.free_space import parse_bytes
from blip_scale.storage.untrusted import parse_json, relative_name

INDEX_NAME = "index.json"
VERSION = 2
OFFSET_LIMIT = 1 << 32
"""Offsets are uint32, so a shard is smaller."""
_CHUNK_BYTES = 1 << 20

_CODECS = {"br": "brotli", "bz2": "bz2", "gz": "gzip", "snappy": "snappy", "zstd": "zstd"}
"""Compression in an index -> Arrow's name of it; a level may follow, as in `zstd:7`."""
_HASHES = (hashlib.algorithms_guaranteed - {"shake_128", "shake_256"}) | xxhash.algorithms_available


Content = bytes  # FileInfo has a field of this name


@dataclass(frozen=True)
class Encoding:
    """How values of a column become bytes."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    size: int | None = None
    """Bytes of every value; None where values differ."""


def _number(layout: str) -> Encoding:
    form = struct.Struct(f"<{layout}")
    return Encoding(form.pack, lambda data: form.unpack(data)[0], form.size)


def _as_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"expected bytes, got {type(value).__name__}")
    return value


def _as_text(value: float) -> bytes:
    return str(value).encode()


def _as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


ENCODINGS = {
    "str": Encoding(str.encode, bytes.decode),
    "bytes": Encoding(_as_bytes, bytes),
    "jpeg": Encoding(_as_bytes, bytes),
    "png": Encoding(_as_bytes, bytes),
    "json": Encoding(_as_json, parse_json),
    "str_int": Encoding(_as_text, int),
    "str_float": Encoding(_as_text, float),
    "int": _number("q"),
    "int8": _number("b"),
    "int16": _number("h"),
    "int32": _number("i"),
    "int64": _number("q"),
    "uint8": _number("B"),
    "uint16": _number("H"),
    "uint32": _number("I"),
    "uint64": _number("Q"),
    "float16": _number("e"),
    "float32": _number("f"),
    "float64": _number("d"),
}
"""The encodings that are read and written; images stay encoded files."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What the index says of a file."""

    basename: str
    """Its path from the folder of the index."""
    bytes: int
    hashes: dict[str, str]
    """Hexadecimal digests by algorithm."""

    def difference(self, data: Content) -> str:
        """How a file's content differs from what the index says; empty if it does not."""
        if len(data) != self.bytes:
            return f"{len(data)} bytes, the index says {self.bytes}"
        for algorithm, digest in self.hashes.items():
            if _digest(algorithm, data) != digest:
                return f"{len(data)} bytes with a wrong checksum"
        return ""


@dataclass(frozen=True)
class Columns:
    """The columns of a shard, in the order in which samples hold them."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for columns that come twice and for encodings that are not read."""
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"a column comes twice in {', '.join(self.names)}")
        for name, encoding in zip(self.names, self.encodings, strict=True):
            if encoding not in ENCODINGS:
                raise ValueError(
                    f"column {name!r} has the encoding {encoding!r}, which is not read "
                    f"(only {', '.join(ENCODINGS)})"
                )

    @property
    def sizes(self) -> list[int | None]:
        """Bytes of each column, None where values differ."""
        return [ENCODINGS[encoding].size for encoding in self.encodings]

    def encode(self, sample: Mapping[str, Any]) -> bytes:
        """Raises ValueError, with the name of the column, for a value that does not fit it."""
        kinds, head = _layout(self.encodings)
        sizes, values = [], []
        for name, kind in zip(self.names, kinds, strict=True):
            try:
                value = kind.encode(sample[name])
            except (TypeError, ValueError, OverflowError, struct.error) as error:
                raise ValueError(f"column {name!r} can't hold the value: {error}") from error
            values.append(value)
            if kind.size is None:
                sizes.append(len(value))
        return head.pack(*sizes) + b"".join(values)

    def decode(self, data: bytes) -> dict[str, Any]:
        """Raises ValueError for bytes that are no sample of these columns."""
        kinds, head = _layout(self.encodings)
        if len(data) < head.size:
            raise ValueError(f"{len(data)} bytes are no sample of {len(kinds)} columns")
        lengths = iter(head.unpack_from(data))
        start, sample = head.size, {}
        for name, kind in zip(self.names, kinds, strict=True):
            end = start + (next(lengths) if kind.size is None else kind.size)
            if end > len(data):
                raise ValueError(f"column {name!r} ends at byte {end} of a sample of {len(data)}")
            try:
                sample[name] = kind.decode(data[start:end])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"column {name!r} is damaged: {error}") from error
            start = end
        return sample


@dataclass(frozen=True, slots=True)
class Shard:
    """One entry of an index: a file of samples."""

    folder: Path
    """Where the index lies."""
    columns: Columns
    samples: int
    raw_data: FileInfo
    zip_data: FileInfo | None = None
    """The compressed file, in a set that has them."""
    compression: str | None = None

    def read(self, index: int) -> dict[str, Any]:
        """One sample, by column.

        Raises:
            IndexError: the shard has fewer samples.
            FileNotFoundError: its uncompressed file is not there.
            ValueError: the file is damaged there.
        """
        if not 0 <= index < self.samples:
            raise IndexError(f"{self.raw_data.basename} has {self.samples} samples, no {index}")
        file = os.open(self.folder / self.raw_data.basename, os.O_RDONLY)
        try:
            span = os.pread(file, 8, 4 + 4 * index)
            begin, end = struct.unpack("<II", span) if len(span) == 8 else (0, 0)
            is_inside = 8 + 4 * self.samples <= begin < end <= self.raw_data.bytes
            data = os.pread(file, end - begin, begin) if is_inside else b""
        finally:
            os.close(file)
        if not data or len(data) != end - begin:
            raise ValueError(f"sample {index} lies outside {self.raw_data.basename}")
        return self.columns.decode(data)

    def decompress(self, data: bytes, target: Path) -> None:
        """Write the uncompressed file of the compressed `data`.

        Raises:
            ValueError: the data is damaged, or holds more or less than the index says.
        """
        assert self.compression is not None
        try:
            written = _decompress(self.compression, data, self.raw_data.bytes, target)
        except ValueError as error:
            raise ValueError(f"{self.raw_data.basename}: {error}") from error
        if written != self.raw_data.bytes:
            raise ValueError(
                f"{self.raw_data.basename} unpacks to {written} bytes, the index says "
                f"{self.raw_data.bytes}"
            )


def read_index(folder: Path) -> list[Shard]:
    """All shards that `folder`/index.json names, without opening them.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged, names files outside the folder, or has columns or hashes that are
            not read.
    """
    return parse_index(folder, index_file(folder).read_bytes())


def index_file(folder: Path) -> Path:
    """The index of a folder; raises FileNotFoundError where there is none."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {INDEX_NAME} in {folder}")
    return path


def parse_index(folder: Path, content: Content) -> list[Shard]:
    """The shards of an index with this content; raises ValueError as `read_index` does.

    Every entry becomes a shard as soon as it is read, which takes a quarter of the memory.
    """

    def parsed(entry: dict[str, Any]) -> Any:
        return parse_shard(folder, entry) if "raw_data" in entry else entry

    try:
        entries = _field(parse_json(content, parsed), "shards", list)
        shards = [
            entry if isinstance(entry, Shard) else parse_shard(folder, entry) for entry in entries
        ]
        names = {shard.raw_data.basename for shard in shards}
        if len(names) < len(shards):
            raise ValueError("two shards have the same name")
    except ValueError as error:
        raise ValueError(
            f"{folder / INDEX_NAME} is not an MDS index ({error}); write the set again"
        ) from error
    return shards


def parse_shard(folder: Path, entry: Any) -> Shard:
    """The shard that an entry of the index in `folder` describes.

    Raises:
        ValueError: it is damaged, or needs what is not read.
    """
    for name, expected in (("version", VERSION), ("format", "mds")):
        if _field(entry, name, type(expected)) != expected:
            raise ValueError(f"{name} is {entry[name]!r}, only {expected!r} is read")
    samples = _field(entry, "samples", int)
    raw_data = _file_info(_field(entry, "raw_data", dict))
    if not (samples >= 0 and 8 + 4 * samples <= raw_data.bytes < OFFSET_LIMIT):
        raise ValueError(
            f"{raw_data.basename} can't hold {samples} samples in {raw_data.bytes} bytes"
        )
    compression, packed = entry.get("compression"), entry.get("zip_data")
    if (compression is None) != (packed is None):
        raise ValueError(f"{raw_data.basename}: compression without zip_data, or the reverse")
    if compression is not None:
        _codec(compression)
    columns = _columns(_texts(entry, "column_names"), _texts(entry, "column_encodings"))
    if _field(entry, "column_sizes", list) != columns.sizes:
        raise ValueError(f"column_sizes {entry['column_sizes']} do not fit {columns.encodings}")
    zip_data = None if packed is None else _file_info(packed)
    return Shard(folder, columns, samples, raw_data, zip_data, compression)


class Writer:
    """Writes samples into shards of at most `size_limit`, and at its end the index.

    For the same samples and settings the shards and the index are those of MosaicML's MDSWriter,
    byte for byte; compressed shards unpack to the same bytes. One thing differs: where the first
    sample exceeds the limit, MDSWriter puts an empty shard before it. As a context manager the
    writer finishes unless there was an error.
    """

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, str],
        size_limit: str | int,
        compression: str | None = None,
        hashes: tuple[str, ...] = (),
    ) -> None:
        """Begin.

        Args:
            folder: made here.
            columns: encoding of each column by its name.
            size_limit: bytes, or a text such as `64mb`; a larger sample gets a shard to itself.
            compression: `br`, `bz2`, `gz`, `snappy` or `zstd`, perhaps with a level: `zstd:7`.
            hashes: algorithms, in alphabetical order.

        Raises:
            FileExistsError: the folder exists.
            ValueError: an argument that makes no sense.
        """
        self._size_limit = parse_bytes(size_limit)
        if not 0 < self._size_limit < OFFSET_LIMIT:
            raise ValueError(f"shard size {size_limit}: expected more than 0 and less than 4gb")
        self._extension = "" if compression is None else f".{_codec(compression)[0]}"
        names = tuple(sorted(columns))
        self._columns = Columns(names, tuple(columns[name] for name in names))
        self._folder, self._compression, self._hashes = folder, compression, hashes
        self._settings = {
            "version": VERSION,
            "format": "mds",
            "compression": compression,
            "hashes": list(hashes),
            "size_limit": self._size_limit,
            "column_names": list(names),
            "column_encodings": list(self._columns.encodings),
            "column_sizes": self._columns.sizes,
        }
        self._head = json.dumps(self._settings, sort_keys=True).encode()
        self.shards: list[dict[str, Any]] = []
        """Entries of the shards that are written."""
        self._samples: list[bytes] = []
        self._bytes = 8 + len(self._head)
        folder.mkdir(parents=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.finish()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append a sample, a value by column.

        Raises:
            ValueError: a value that does not fit its column.
            OSError: the disk does not take it.
        """
        data = self._columns.encode(sample)
        if self._samples and self._bytes + len(data) + 4 > self._size_limit:
            self._flush()
        self._samples.append(data)
        self._bytes += len(data) + 4

    def finish(self) -> None:
        """Write what is left, and the index."""
        if self._samples:
            self._flush()
        index = {"version": VERSION, "shards": self.shards}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, sort_keys=True))

    def _flush(self) -> None:
        count = len(self._samples)
        sizes = np.fromiter(map(len, self._samples), np.int64, count)
        start = 4 + 4 * (count + 1) + len(self._head)
        offsets = start + np.concatenate([[0], np.cumsum(sizes)])
        if offsets[-1] >= OFFSET_LIMIT:
            raise ValueError(f"a sample of {sizes.max()} bytes is too large for a shard")
        parts = [np.uint32(count).tobytes(), offsets.astype("<u4").tobytes(), self._head]
        raw = b"".join([*parts, *self._samples])
        name = f"shard.{len(self.shards):05}.mds"
        entry = {"samples": count, "raw_data": self._info(name, raw), "zip_data": None}
        if self._compression is not None:
            name, raw = name + self._extension, _compress(self._compression, raw)
            entry["zip_data"] = self._info(name, raw)
        (self._folder / name).write_bytes(raw)
        self.shards.append(entry | self._settings)
        self._samples, self._bytes = [], 8 + len(self._head)

    def _info(self, name: str, data: bytes) -> dict[str, Any]:
        hashes = {algorithm: _digest(algorithm, data) for algorithm in self._hashes}
        return {"basename": name, "bytes": len(data), "hashes": hashes}


def _digest(algorithm: str, data: bytes) -> str:
    if algorithm in xxhash.algorithms_available:
        return str(getattr(xxhash, algorithm)(data).hexdigest())
    return hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()


def _field(entry: Any, name: str, kind: type) -> Any:
    """A field of a JSON object; raises ValueError where it is missing or of another type."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is not {kind.__name__}")
    return value


def _texts(entry: Any, name: str) -> tuple[str, ...]:
    texts = _field(entry, name, list)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} holds other things than texts")
    return tuple(texts)


@lru_cache(maxsize=64)
def _layout(encodings: tuple[str, ...]) -> tuple[list[Encoding], struct.Struct]:
    """The encodings of a sample, and the sizes that it begins with."""
    kinds = [ENCODINGS[encoding] for encoding in encodings]
    return kinds, struct.Struct(f"<{sum(kind.size is None for kind in kinds)}I")


@lru_cache(maxsize=64)  # the shards of a set share theirs
def _columns(names: tuple[str, ...], encodings: tuple[str, ...]) -> Columns:
    if len(names) != len(encodings):
        raise ValueError(f"{len(names)} column_names, but {len(encodings)} column_encodings")
    return Columns(names, encodings)


def check_shard_name(basename: str) -> None:
    """Raises ValueError for a name that can't be one of a shard. It becomes a path here and a key
    of the remote."""
    relative_name(basename)
    if basename.split("/")[0] == INDEX_NAME or basename.startswith("."):
        raise ValueError(f"the file name {basename!r} is not one of a shard")


def _file_info(entry: Any) -> FileInfo:
    basename, size = _field(entry, "basename", str), _field(entry, "bytes", int)
    check_shard_name(basename)
    if size < 0:
        raise ValueError(f"{basename} has {size} bytes")
    hashes = _field(entry, "hashes", dict)
    for algorithm, digest in hashes.items():
        if algorithm not in _HASHES or not isinstance(digest, str):
            raise ValueError(f"{basename} has a hash {algorithm!r} that can't be checked")
    return FileInfo(basename, size, hashes)


def _codec(compression: Any) -> tuple[str, int | None]:
    """Name and level of a compression; raises ValueError for one that is not known."""
    match = re.fullmatch(r"(\w+)(?::(\d{1,2}))?", str(compression))
    if match is None or match[1] not in _CODECS:
        raise ValueError(f"compression {compression!r} is not one of {', '.join(_CODECS)}")
    return match[1], None if match[2] is None else int(match[2])


def _compress(compression: str, data: bytes) -> bytes:
    name, level = _codec(compression)
    if name == "bz2":  # Arrow's has no level
        return bz2.compress(data, 9 if level is None else level)
    from pyarrow import Codec  # slow to import

    return bytes(Codec(_CODECS[name], level).compress(data, asbytes=True))


def _decompress(compression: str, data: bytes, limit: int, target: Path) -> int:
    """Write what `data` unpacks to into a file; returns its bytes, some more than `limit` where
    there are more.

    Raises ValueError for damaged data.
    """
    import pyarrow  # slow to import

    name, written = _codec(compression)[0], 0
    try:
        if name == "snappy":  # has no frames: it is unpacked at once, and begins with its size
            written = _snappy_size(data)
            if written == limit:
                target.write_bytes(pyarrow.decompress(data, written, "snappy", asbytes=True))
            return written
        packed = pyarrow.BufferReader(data)
        with target.open("wb") as file, pyarrow.CompressedInputStream(packed, _CODECS[name]) as raw:
            while written <= limit and (chunk := raw.read(_CHUNK_BYTES)):
                written += len(chunk)
                file.write(chunk)
    except OSError as error:
        if error.errno is not None:  # the disk's fault, not the data's
            raise
        raise ValueError(f"can't be unpacked: {error}") from error
    return written


def _snappy_size(data: bytes) -> int:
    """The size that Snappy data states, a varint of at most five bytes."""
    size = 0
    for place, byte in enumerate(data[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return size
    raise ValueError("is no Snappy data")
