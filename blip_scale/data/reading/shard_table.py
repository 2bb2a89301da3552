"""Index of a set as arrays, which loader workers share: 75 bytes per shard.

Parsing index.json takes seconds for 100,000 shards, so the arrays are cached beside it in a hidden
file with the hash of the index. The file may come from an untrusted source, like the index. It is
copied first, and the copy must pass the checks of an index. A stale, damaged or hostile file is
rebuilt. If the folder is read-only, the index is parsed at each start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blip_scale.data import mds
from blip_scale.data.captions import DEFAULT_ROLE
from blip_scale.data.mds import INDEX_NAME, Columns, Shard, ShardSize
from blip_scale.data.overlays import OVERLAY_KEY
from blip_scale.data.reading.shared_arrays import SharedArray, SharedArrays, return_freed_memory
from blip_scale.data.shards import (
    COLUMNS,
    ROLES_KEY,
    parse_role_counts,
    read_caption_counts,
    require_columns,
)
from blip_scale.storage.untrusted import parse_json

SHARDS_CACHE = ".index.shards"
CAPTIONS_CACHE = ".index.captions"
"""Hidden files beside an index. No shard can have such a name."""
CACHED_FROM = 1_000
"""Minimum number of shards for a cache. Parsing a smaller index takes about 20 ms."""
_PLAIN_NAME = re.compile(rb"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ShardTable:
    """Shards of a set, by number."""

    def __init__(self, folder: Path, arrays: SharedArrays) -> None:
        self.folder = folder
        self._root = str(folder)
        self.samples: NDArray[np.int64] = arrays["samples"]
        """Number of samples of each shard."""
        self.raw_bytes: NDArray[np.int64] = arrays["raw_bytes"]
        """Bytes of each uncompressed shard."""
        self._arrays = arrays
        self._settings = arrays["settings"]
        self._columns: dict[int, Columns] = {}
        """Columns by index of the entry in `settings`."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def roles(self) -> list[str]:
        """Caption roles in the index; only `caption` if the index names none."""
        return list(self._arrays.meta["roles"]) or [DEFAULT_ROLE]

    @property
    def overlay(self) -> Any:
        """Description of the images of an overlay, from its index; None in other sets."""
        return self._arrays.meta["overlay"]

    @property
    def index_sha256(self) -> str:
        """SHA-256 of the index."""
        return str(self._arrays.meta["index_sha256"])

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Shard:
        """Shard with its hashes and its compressed file, which are needed to fetch it.

        Raises:
            IndexError: there are fewer shards.
            ValueError: a cached table holds an entry that is invalid in an index.
        """
        try:
            details = parse_json(self._text("file", number))
            entry = dict(self._arrays.meta["settings"][int(self._arrays["settings"][number])])
            entry["samples"] = int(self.samples[number])
            entry["raw_data"] = {
                "basename": self.name(number),
                "bytes": int(self.raw_bytes[number]),
                "hashes": details[0],
            }
            if len(details) > 1:
                packed = dict(zip(("basename", "bytes", "hashes"), details[1:], strict=True))
                entry["zip_data"] = packed
            return mds.parse_shard(self.folder, entry)
        except IndexError:  # there are fewer shards
            raise
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"{self.folder / SHARDS_CACHE} is damaged at shard {number} ({error}): remove it"
            ) from error

    @property
    def shared_samples(self) -> SharedArray:
        """`samples` in a form that is pickled as a reference to shared memory."""
        return SharedArray(self._arrays, "samples")

    def columns(self, number: int) -> Columns:
        """Columns of a shard."""
        settings = int(self._settings[number])
        if settings not in self._columns:
            self._columns[settings] = self[number].columns
        return self._columns[settings]

    def read(self, number: int, sample: int) -> dict[str, Any]:
        """Read a sample of an uncompressed shard in the folder; see `mds.read_sample`."""
        path = f"{self._root}/{self.name(number)}"
        size = ShardSize(int(self.samples[number]), int(self.raw_bytes[number]))
        return mds.read_sample(path, self.columns(number), size, sample)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardTable, (self.folder, self._arrays)

    @classmethod
    def pack(
        cls, folder: Path, shards: Sequence[Shard], index_hash: str, document: Mapping[str, Any]
    ) -> ShardTable:
        """Convert the shards and other fields of an index to arrays.

        Raises:
            ValueError: the counts of caption roles are invalid.
        """
        settings: dict[tuple[Columns, str | None], int] = {}
        numbers, names, files = [], [], []
        for shard in shards:
            common = (shard.columns, shard.compression)
            numbers.append(settings.setdefault(common, len(settings)))
            names.append(shard.raw_data.basename.encode() + b"\n")
            details: list[Any] = [shard.raw_data.hashes]
            if shard.zip_data is not None:
                packed = shard.zip_data
                details += [packed.basename, packed.bytes, packed.hashes]
            files.append(json.dumps(details, separators=(",", ":")).encode())
        meta = {
            "index_sha256": index_hash,
            "settings": [_entry(*common) for common in settings],
            "roles": parse_role_counts(document.get(ROLES_KEY)),
            "overlay": document.get(OVERLAY_KEY),
        }
        arrays: dict[str, np.ndarray] = {
            "samples": np.array([shard.samples for shard in shards], np.int64),
            "raw_bytes": np.array([shard.raw_data.bytes for shard in shards], np.int64),
            "settings": np.array(numbers, np.int32),
            "name_ends": _ends(names),
            "file_ends": _ends(files),
            "names": np.frombuffer(b"".join(names), np.uint8),
            "files": np.frombuffer(b"".join(files), np.uint8),
        }
        return cls(folder, SharedArrays.pack(meta, arrays))

    def name(self, number: int) -> str:
        """Path of an uncompressed shard, relative to the folder of the index."""
        return self._text("name", number)[:-1].decode()

    def names(self) -> list[bytes]:
        """`name` of every shard, as bytes in the file system's encoding."""
        return self._arrays["names"].tobytes().split(b"\n")[:-1]

    def packed_name(self, number: int) -> str | None:
        """Path of a compressed shard, relative to the folder; None if the set is not compressed."""
        details = parse_json(self._text("file", number))
        return details[1] if len(details) > 1 else None

    def check(self, columns: Iterable[str]) -> None:
        """Check arrays from a file. Hashes and compressed files are checked when a shard is used.

        Raises:
            ValueError: the arrays are inconsistent or invalid in an index, or shards lack
                `columns`.
        """
        count, arrays = len(self), self._arrays
        _require_types(arrays, samples="i", raw_bytes="i", settings="i", names="u", files="u")
        parse_role_counts(arrays.meta["roles"])
        sizes = [len(arrays[name]) for name in ("raw_bytes", "settings", "name_ends", "file_ends")]
        names = self.names()
        name_ends = np.cumsum([len(name) + 1 for name in names])
        is_whole = (
            set(sizes) == {count}
            and np.array_equal(name_ends, arrays["name_ends"])
            and len(set(names)) == count
            and np.all(np.diff(arrays["file_ends"], prepend=0) > 0)
            and arrays["file_ends"][-1] == len(arrays["files"])
            and np.all(self.samples >= 0)
            and np.all(self.raw_bytes < mds.OFFSET_LIMIT)
        )
        if not is_whole:
            raise ValueError("its arrays contradict each other")
        for name in names:
            if not _PLAIN_NAME.fullmatch(name) or name == INDEX_NAME.encode():
                mds.check_shard_name(name.decode())
        _, firsts, kinds = np.unique(arrays["settings"], return_index=True, return_inverse=True)
        shards = [self[number] for number in firsts.tolist()]
        least = np.array([shard.columns.least_bytes for shard in shards], np.int64)[kinds]
        if np.any(self.samples > (self.raw_bytes - 8) // least):
            raise ValueError("a shard is too small for its samples")
        require_columns(self.folder, shards, columns)

    def save(self, path: Path) -> None:
        """Write the arrays for `SharedArrays.load`; raises OSError where the disk takes none."""
        self._arrays.save(path)

    def _text(self, name: str, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.folder} has {len(self)} shards, no {number}")
        ends = self._arrays[f"{name}_ends"]
        start = int(ends[number - 1]) if number else 0
        return self._arrays[f"{name}s"][start : int(ends[number])].tobytes()


class CaptionTable:
    """Number of captions of every sample, as arrays."""

    def __init__(self, arrays: SharedArrays) -> None:
        self.items: NDArray[np.int64] = arrays["items"]
        """Number of captions of each shard."""
        self._starts = arrays["starts"]
        """Index in `counts` of each shard's first sample; -1 if all samples have one caption."""
        self._counts = arrays["counts"]
        self._arrays = arrays

    @property
    def shared_items(self) -> SharedArray:
        """`items` in a form that is pickled as a reference to shared memory."""
        return SharedArray(self._arrays, "items")

    def __reduce__(self) -> tuple[Any, ...]:
        return CaptionTable, (self._arrays,)

    @classmethod
    def pack(
        cls, counts: Sequence[Sequence[int] | None], samples: NDArray[np.int64], index_hash: str
    ) -> CaptionTable:
        """Convert the caption counts of an index to arrays.

        Args:
            counts: for each shard, the number of captions of each sample; None if all have one.
            samples: number of samples of each shard.
            index_hash: hash of the index.
        """
        items = samples.copy()
        for shard, part in enumerate(counts):
            if part is not None:
                items[shard] = sum(part)
        lengths = np.array([0 if part is None else len(part) for part in counts], np.int64)
        starts = np.where([part is None for part in counts], -1, np.cumsum(lengths) - lengths)
        max_captions = max((max(part, default=0) for part in counts if part is not None), default=0)
        parts = [
            np.array(part, np.min_scalar_type(max_captions)) for part in counts if part is not None
        ]
        arrays = {
            "items": items,
            "starts": starts.astype(np.int64),
            "counts": np.concatenate(parts) if parts else np.zeros(0, np.uint8),
        }
        return cls(SharedArrays.pack({"index_sha256": index_hash}, arrays))

    def locate(self, shard: int, item: int, samples: int) -> tuple[int, int]:
        """Find the sample that a caption belongs to.

        Args:
            shard: index of the shard.
            item: index of the caption among all captions of the shard.
            samples: number of samples of the shard.

        Returns:
            index of the sample, and index of the caption in the sample.

        Raises:
            ValueError: a cached table is inconsistent.
        """
        start = int(self._starts[shard])
        if start < 0:
            return item, 0
        ends = np.cumsum(self._counts[start : start + samples], dtype=np.int64)
        if len(ends) != samples or int(ends[-1]) != self.items[shard]:
            raise ValueError(f"{CAPTIONS_CACHE} is damaged at shard {shard}: remove it")
        sample = int(np.searchsorted(ends, item, side="right"))
        return sample, item - (int(ends[sample - 1]) if sample else 0)

    def check(self, samples: NDArray[np.int64]) -> None:
        """Check arrays from a file.

        Raises:
            ValueError: the arrays do not fit shards with these numbers of samples.
        """
        _require_types(self._arrays, items="i", starts="i", counts="u")
        has_counts = self._starts >= 0
        ends = (self._starts + samples)[has_counts]
        if (
            not len(self.items) == len(self._starts) == len(samples)
            or np.any(self.items < 0)
            or np.any(ends > len(self._counts))
            or not np.array_equal(self.items[~has_counts], samples[~has_counts])
        ):
            raise ValueError("its arrays contradict each other")

    def save(self, path: Path) -> None:
        """Write the arrays for `SharedArrays.load`; raises OSError where the disk takes none."""
        self._arrays.save(path)


def open_shards(folder: Path, columns: Iterable[str] = COLUMNS) -> ShardTable:
    """Read the shards in `folder`/index.json, from the cached table if it is valid.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the index can't be read, or shards lack some of the columns.
    """

    def checked(arrays: SharedArrays) -> ShardTable:
        table = ShardTable(folder, arrays)
        table.check(columns)
        return table

    cached = _load(folder, SHARDS_CACHE, checked)
    if cached is not None:
        if len(cached) >= CACHED_FROM:
            return_freed_memory()
        return cached
    content = mds.index_file(folder).read_bytes()
    shards, document = mds.parse_index(folder, content)
    require_columns(folder, shards, columns)
    try:
        table = ShardTable.pack(folder, shards, hashlib.sha256(content).hexdigest(), document)
    except ValueError as error:
        raise ValueError(f"{folder / INDEX_NAME}: {error}: write the set again") from error
    if len(table) >= CACHED_FROM:
        _save(table, folder / SHARDS_CACHE)
        del shards, document, content
        return_freed_memory()
    return table


def open_captions(folder: Path, shards: ShardTable) -> CaptionTable:
    """Read the caption counts in `folder`/index.json, from the cached table if it is valid.

    Raises:
        ValueError: the index lacks them.
    """

    def checked(arrays: SharedArrays) -> CaptionTable:
        table = CaptionTable(arrays)
        table.check(shards.samples)
        return table

    cached = _load(folder, CAPTIONS_CACHE, checked)
    if cached is not None:
        return cached
    index_hash = _hash_of(folder)
    counts = read_caption_counts(folder)
    table = CaptionTable.pack(counts, shards.samples, index_hash)
    table.check(shards.samples)
    if len(shards) >= CACHED_FROM:
        _save(table, folder / CAPTIONS_CACHE)
    return table


def _load(folder: Path, name: str, checked: Callable[[SharedArrays], T]) -> T | None:
    """Load the cached table of the index in `folder`; None if it is missing or must be rebuilt."""
    path, index = folder / name, mds.index_file(folder)
    if not path.is_symlink() and not path.exists():
        return None
    try:
        arrays = SharedArrays.load(path, 2 * index.stat().st_size + (1 << 20))
        if arrays.meta["index_sha256"] != _hash_of(folder):
            logger.info("%s belongs to another index: making it again", path)
            return None
        return checked(arrays)
    except (OSError, ValueError, TypeError, LookupError) as error:
        logger.warning("%s is not used (%s): making it again from %s", path, error, INDEX_NAME)
        return None


def _save(table: ShardTable | CaptionTable, path: Path) -> None:
    try:
        table.save(path)
    except OSError as error:
        logger.info("%s can't be written (%s): every start parses the index again", path, error)


def _hash_of(folder: Path) -> str:
    with mds.index_file(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(columns: Columns, compression: str | None) -> dict[str, Any]:
    """Fields of an index entry that most shards of a set share."""
    return {
        "version": mds.VERSION,
        "format": "mds",
        "compression": compression,
        "column_names": list(columns.names),
        "column_encodings": list(columns.encodings),
        "column_sizes": columns.sizes,
    }


def _require_types(arrays: SharedArrays, **kinds: str) -> None:
    """Raise ValueError if an array's dtype has another kind: `i` signed, `u` unsigned integers."""
    for name, kind in kinds.items():
        if arrays[name].dtype.kind != kind:
            raise ValueError(f"array {name} is of type {arrays[name].dtype}")


def _ends(texts: Sequence[bytes]) -> NDArray[Any]:
    """End of each text in their concatenation."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return ends.astype(np.uint32) if not len(ends) or ends[-1] < 1 << 32 else ends
