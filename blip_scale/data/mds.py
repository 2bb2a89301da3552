"""Read and write MosaicML Streaming's MDS format: shards of samples, listed in index.json.

A shard file holds, in little-endian byte order:

- the number of samples, uint32;
- the offset of each sample in the file, and the end of the last one, uint32 each;
- the settings of the writer as JSON, which readers ignore;
- the samples. Each begins with the sizes (uint32) of its variable-size columns. The columns follow
  in the order of their names.

index.json holds `version` (2) and `shards`. The entry of a shard has its columns, its number of
samples, and the name, size and hashes of its file, uncompressed and compressed.

A data set must not contain code. An index is refused if a column has an encoding outside
`ENCODINGS`, in particular `pkl`. This module does not need the package `streaming`; the tests
compare their results.
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
from typing import Any, NamedTuple

import numpy as np
import xxhash

from blip_scale.storage.free_space import parse_bytes
from blip_scale.storage.untrusted import parse_json, relative_name

INDEX_NAME = "index.json"
VERSION = 2
OFFSET_LIMIT = 1 << 32
"""Upper limit of a shard's size, because offsets are uint32."""
_CHUNK_BYTES = 1 << 20

_CODECS = {"br": "brotli", "bz2": "bz2", "gz": "gzip", "snappy": "snappy", "zstd": "zstd"}
"""Name of a compression in an index -> Arrow's name; a level may follow, as in `zstd:7`."""
_HASHES = (hashlib.algorithms_guaranteed - {"shake_128", "shake_256"}) | xxhash.algorithms_available


Content = bytes  # alias, because FileInfo has a field named `bytes`


@dataclass(frozen=True)
class Encoding:
    """Conversion between values of a column and bytes."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    size: int | None = None
    """Size of every value in bytes; None if sizes vary."""


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
"""Name -> supported encoding; images stay encoded files."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Name, size and hashes of a file, from the index."""

    basename: str
    """Path relative to the folder of the index."""
    bytes: int
    hashes: dict[str, str]
    """Hexadecimal digests by algorithm."""

    def difference(self, data: Content) -> str:
        """Describe how a file's content differs from the index; "" if it does not."""
        if len(data) != self.bytes:
            return f"{len(data)} bytes, the index says {self.bytes}"
        for algorithm, digest in self.hashes.items():
            if _digest(algorithm, data) != digest:
                return f"{len(data)} bytes with a wrong checksum"
        return ""


@dataclass(frozen=True)
class Columns:
    """Columns of a shard, in the order of a sample's bytes."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the columns.

        Raises:
            ValueError: a column occurs twice, or an encoding is not supported.
        """
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"a column occurs twice in {', '.join(self.names)}")
        for name, encoding in zip(self.names, self.encodings, strict=True):
            if encoding not in ENCODINGS:
                raise ValueError(
                    f"column {name!r} has the encoding {encoding!r}, which is not supported "
                    f"(only {', '.join(ENCODINGS)})"
                )

    @property
    def sizes(self) -> list[int | None]:
        """Size of each column in bytes; None if sizes vary."""
        return [ENCODINGS[encoding].size for encoding in self.encodings]

    @property
    def least_bytes(self) -> int:
        """Minimum bytes of a sample in a shard: its offset, and each column or its size field."""
        return 4 + sum(4 if size is None else size for size in self.sizes)

    def encode(self, sample: Mapping[str, Any]) -> bytes:
        """Encode a sample.

        Raises:
            ValueError: a value does not fit its column, which the message names.
        """
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
        """Decode a sample.

        Raises:
            ValueError: the bytes are not a sample of these columns.
        """
        kinds, head = _layout(self.encodings)
        if len(data) < head.size:
            raise ValueError(f"{len(data)} bytes are not a sample of {len(kinds)} columns")
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


class ShardSize(NamedTuple):
    """Bytes and samples of a shard's file, from the index."""

    samples: int
    bytes: int


def read_sample(path: str, columns: Columns, size: ShardSize, index: int) -> dict[str, Any]:
    """Read a sample of an uncompressed shard as a mapping from column to value.

    Args:
        path: file of the shard.
        columns: columns of the shard.
        size: size of the shard.
        index: index of the sample in the shard.

    Raises:
        IndexError: the shard has fewer samples.
        FileNotFoundError: the file is missing.
        ValueError: the sample is damaged.
    """
    if not 0 <= index < size.samples:
        name = path.rpartition("/")[2]
        raise IndexError(f"{name} has no sample {index}, it has {size.samples} samples")
    file = os.open(path, os.O_RDONLY)
    try:
        # After the number of samples, the header has the offset of each sample and of the end.
        span = os.pread(file, 8, 4 + 4 * index)
        begin, end = struct.unpack("<II", span) if len(span) == 8 else (0, 0)
        is_inside = 8 + 4 * size.samples <= begin < end <= size.bytes
        data = os.pread(file, end - begin, begin) if is_inside else b""
    finally:
        os.close(file)
    if not data or len(data) != end - begin:
        raise ValueError(f"sample {index} lies outside {path.rpartition('/')[2]}")
    return columns.decode(data)


@dataclass(frozen=True, slots=True)
class Shard:
    """An entry of an index: a file of samples."""

    folder: Path
    """Folder of the index."""
    columns: Columns
    samples: int
    raw_data: FileInfo
    zip_data: FileInfo | None = None
    """Compressed file, if the set is compressed."""
    compression: str | None = None

    def read(self, index: int) -> dict[str, Any]:
        """Read a sample; see `read_sample`."""
        size = ShardSize(self.samples, self.raw_data.bytes)
        return read_sample(f"{self.folder}/{self.raw_data.basename}", self.columns, size, index)

    def decompress(self, data: bytes, target: Path) -> None:
        """Decompress the content of the compressed file to `target`.

        Raises:
            ValueError: the data are damaged, or their size differs from the index.
        """
        assert self.compression is not None
        try:
            written = _decompress(self.compression, data, self.raw_data.bytes, target)
        except ValueError as error:
            raise ValueError(f"{self.raw_data.basename}: {error}") from error
        if written != self.raw_data.bytes:
            raise ValueError(
                f"{self.raw_data.basename} decompresses to {written} bytes, the index says "
                f"{self.raw_data.bytes}"
            )


def read_index(folder: Path) -> list[Shard]:
    """Read the shards named in `folder`/index.json, without opening them.

    Raises:
        FileNotFoundError: the folder has no index.
        ValueError: the index is damaged, names files outside the folder, or has unsupported columns
            or hashes.
    """
    return parse_index(folder, index_file(folder).read_bytes())[0]


def index_file(folder: Path) -> Path:
    """Return the path of the index in a folder.

    Raises:
        FileNotFoundError: there is no index.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {INDEX_NAME} in {folder}")
    return path


def parse_index(folder: Path, content: Content) -> tuple[list[Shard], dict[str, Any]]:
    """Parse the content of an index.

    Each entry becomes a `Shard` as soon as it is parsed. This reduces the memory to a quarter.

    Returns:
        The shards, and all fields of the index.

    Raises:
        ValueError: see `read_index`.
    """

    def parsed(entry: dict[str, Any]) -> Any:
        return parse_shard(folder, entry) if "raw_data" in entry else entry

    try:
        document = parse_json(content, parsed)
        entries = _field(document, "shards", list)
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
    return shards, document


def parse_shard(folder: Path, entry: Any) -> Shard:
    """Parse an entry of the index in `folder`.

    Raises:
        ValueError: the entry is damaged, or needs unsupported features.
    """
    for name, expected in (("version", VERSION), ("format", "mds")):
        if _field(entry, name, type(expected)) != expected:
            raise ValueError(f"{name} is {entry[name]!r}, only {expected!r} is supported")
    samples = _field(entry, "samples", int)
    raw_data = _file_info(_field(entry, "raw_data", dict))
    compression, packed = entry.get("compression"), entry.get("zip_data")
    if (compression is None) != (packed is None):
        raise ValueError(f"{raw_data.basename}: compression without zip_data, or the reverse")
    if compression is not None:
        _codec(compression)
    columns = _columns(_texts(entry, "column_names"), _texts(entry, "column_encodings"))
    if _field(entry, "column_sizes", list) != columns.sizes:
        raise ValueError(f"column_sizes {entry['column_sizes']} do not fit {columns.encodings}")
    least = columns.least_bytes
    if not (samples >= 0 and 8 + least * samples <= raw_data.bytes < OFFSET_LIMIT):
        raise ValueError(
            f"{raw_data.basename} can't hold {samples} samples of at least {least} bytes in "
            f"{raw_data.bytes} bytes"
        )
    zip_data = None if packed is None else _file_info(packed)
    return Shard(folder, columns, samples, raw_data, zip_data, compression)


class Writer:
    """Writes samples to shards of at most `size_limit`, and finally the index.

    Shards and index are byte-identical to those of MosaicML's MDSWriter for the same samples and
    settings. Compressed shards decompress to identical bytes. There is one difference: if the first
    sample exceeds the limit, MDSWriter writes an empty shard before it.

    When used as a context manager, the writer calls `finish` on exit unless there was an error.
    """

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, str],
        size_limit: str | int,
        compression: str | None = None,
        hashes: tuple[str, ...] = (),
    ) -> None:
        """Create the folder and start writing.

        Args:
            folder: folder to create.
            columns: column name -> encoding.
            size_limit: bytes, or a string such as `64mb`. A larger sample gets its own shard.
            compression: `br`, `bz2`, `gz`, `snappy` or `zstd`, optionally with a level, as in
                `zstd:7`.
            hashes: names of hash algorithms, in alphabetical order.

        Raises:
            FileExistsError: the folder exists.
            ValueError: an argument is invalid.
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
        """Index entries of the shards written."""
        self._samples: list[bytes] = []
        self._bytes = 8 + len(self._head)
        folder.mkdir(parents=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.finish()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append a sample, given as a mapping from column to value.

        Raises:
            ValueError: a value does not fit its column.
            OSError: the write failed.
        """
        data = self._columns.encode(sample)
        if self._samples and self._bytes + len(data) + 4 > self._size_limit:
            self._flush()
        self._samples.append(data)
        self._bytes += len(data) + 4

    def end_shard(self) -> None:
        """End the current shard and write it, even if it is empty."""
        self._flush()

    def finish(self) -> None:
        """Write the remaining samples and the index."""
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
    """Read a field of a JSON object.

    Raises:
        ValueError: the field is missing or has another type.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is not {kind.__name__}")
    return value


def _texts(entry: Any, name: str) -> tuple[str, ...]:
    texts = _field(entry, name, list)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is not a list of strings")
    return tuple(texts)


@lru_cache(maxsize=64)
def _layout(encodings: tuple[str, ...]) -> tuple[list[Encoding], struct.Struct]:
    """Return the encodings of the columns, and the struct of a sample's leading size fields."""
    kinds = [ENCODINGS[encoding] for encoding in encodings]
    return kinds, struct.Struct(f"<{sum(kind.size is None for kind in kinds)}I")


@lru_cache(maxsize=64)  # shards of a set share their columns
def _columns(names: tuple[str, ...], encodings: tuple[str, ...]) -> Columns:
    if len(names) != len(encodings):
        raise ValueError(f"{len(names)} column_names, but {len(encodings)} column_encodings")
    return Columns(names, encodings)


def check_shard_name(basename: str) -> None:
    """Check the name of a shard, which becomes a local path and an object key in the remote.

    Raises:
        ValueError: the name is not a relative path, or is not allowed for a shard.
    """
    relative_name(basename)
    if basename.split("/")[0] == INDEX_NAME or basename.startswith("."):
        raise ValueError(f"the file name {basename!r} is not allowed for a shard")


def _file_info(entry: Any) -> FileInfo:
    basename, size = _field(entry, "basename", str), _field(entry, "bytes", int)
    check_shard_name(basename)
    if size < 0:
        raise ValueError(f"{basename} has {size} bytes")
    hashes = _field(entry, "hashes", dict)
    for algorithm, digest in hashes.items():
        if algorithm not in _HASHES or not isinstance(digest, str):
            raise ValueError(f"{basename} has a hash {algorithm!r}, which is not supported")
    return FileInfo(basename, size, hashes)


def _codec(compression: Any) -> tuple[str, int | None]:
    """Parse a compression into name and level.

    Raises:
        ValueError: the compression is unknown.
    """
    match = re.fullmatch(r"(\w+)(?::(\d{1,2}))?", str(compression))
    if match is None or match[1] not in _CODECS:
        raise ValueError(f"compression {compression!r} is not one of {', '.join(_CODECS)}")
    return match[1], None if match[2] is None else int(match[2])


def _compress(compression: str, data: bytes) -> bytes:
    name, level = _codec(compression)
    if name == "bz2":  # Arrow's codec has no level
        return bz2.compress(data, 9 if level is None else level)
    from pyarrow import Codec  # slow to import

    return bytes(Codec(_CODECS[name], level).compress(data, asbytes=True))


def _decompress(compression: str, data: bytes, limit: int, target: Path) -> int:
    """Decompress `data` to a file, and return the number of bytes.

    Stop soon after `limit` bytes if there are more.

    Raises:
        ValueError: the data are damaged.
    """
    import pyarrow  # slow to import

    name, written = _codec(compression)[0], 0
    try:
        if name == "snappy":  # no frames: decompress at once; the data begin with the size
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
        if error.errno is not None:  # the disk failed, not the data
            raise
        raise ValueError(f"can't be decompressed: {error}") from error
    return written


def _snappy_size(data: bytes) -> int:
    """Return the size at the beginning of Snappy data, a varint of at most five bytes."""
    size = 0
    for place, byte in enumerate(data[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return size
    raise ValueError("not Snappy data")
