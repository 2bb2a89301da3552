"""The shards of a set in arrays, which loader workers share: 75 bytes a shard.

Reading index.json takes seconds for 100,000 shards, so the arrays are kept beside it in a hidden
file, with the hash of the index that they were made from. Such a file may come from a stranger, as
the index may: it is copied, and then passes the checks of an index. A file that is stale, damaged
or hostile is made again, and a folder that can't be written is read without one.
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
"""The hidden files beside an index. No shard can have such a name."""
CACHED_FROM = 1_000
"""Smaller sets are parsed at every start, in some 20 ms."""
_PLAIN_NAME = re.compile(rb"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ShardTable:
    """The shards of a set by number."""

    def __init__(self, folder: Path, arrays: SharedArrays) -> None:
        self.folder = folder
        self._root = str(folder)
        self.samples: NDArray[np.int64] = arrays["samples"]
        """Samples of each shard."""
        self.raw_bytes: NDArray[np.int64] = arrays["raw_bytes"]
        """Bytes of each uncompressed shard."""
        self._arrays = arrays
        self._settings = arrays["settings"]
        self._columns: dict[int, Columns] = {}
        """Columns by the number of the settings."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def roles(self) -> list[str]:
        """Roles of captions that the index names; `caption` alone where it names none."""
        return list(self._arrays.meta["roles"]) or [DEFAULT_ROLE]

    @property
    def overlay(self) -> Any:
        """Description of the images in the index of an overlay; None in other sets."""
        return self._arrays.meta["overlay"]

    @property
    def index_sha256(self) -> str:
        """SHA-256 of the index."""
        return str(self._arrays.meta["index_sha256"])

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Shard:
        """A shard with its hashes and its compressed file, for whoever fetches it.

        Raises:
            IndexError: there are fewer shards.
            ValueError: a cached table holds what an index may not say.
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
        """`samples`, to be sent to other processes of this machine."""
        return SharedArray(self._arrays, "samples")

    def columns(self, number: int) -> Columns:
        """Columns of a shard."""
        settings = int(self._settings[number])
        if settings not in self._columns:
            self._columns[settings] = self[number].columns
        return self._columns[settings]

    def read(self, number: int, sample: int) -> dict[str, Any]:
        """A sample of an uncompressed shard that lies in the folder; see `mds.read_sample`."""
        path = f"{self._root}/{self.name(number)}"
        size = ShardSize(int(self.samples[number]), int(self.raw_bytes[number]))
        return mds.read_sample(path, self.columns(number), size, sample)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardTable, (self.folder, self._arrays)

    @classmethod
    def pack(
        cls, folder: Path, shards: Sequence[Shard], index_hash: str, document: Mapping[str, Any]
    ) -> ShardTable:
        """Put the shards of an index, and what else it says, into arrays.

        Raises:
            ValueError: it says something odd of the roles of captions.
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
        """Path of an uncompressed shard from the folder of the index."""
        return self._text("name", number)[:-1].decode()

    def names(self) -> list[bytes]:
        """`name` of every shard, as a file system's bytes."""
        return self._arrays["names"].tobytes().split(b"\n")[:-1]

    def packed_name(self, number: int) -> str | None:
        """Path of a compressed shard, None in a set without them."""
        details = parse_json(self._text("file", number))
        return details[1] if len(details) > 1 else None

    def check(self, columns: Iterable[str]) -> None:
        """Raises ValueError where arrays from a file contradict each other or what an index may
        say, or where shards lack `columns`. The hashes of a shard, and its compressed file, are
        checked when it is used."""
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
    """Captions of every sample, in arrays."""

    def __init__(self, arrays: SharedArrays) -> None:
        self.items: NDArray[np.int64] = arrays["items"]
        """Captions of each shard."""
        self._starts = arrays["starts"]
        """First count of each shard in `counts`; -1 where all of its samples have one caption."""
        self._counts = arrays["counts"]
        self._arrays = arrays

    @property
    def shared_items(self) -> SharedArray:
        """`items`, to be sent to other processes of this machine."""
        return SharedArray(self._arrays, "items")

    def __reduce__(self) -> tuple[Any, ...]:
        return CaptionTable, (self._arrays,)

    @classmethod
    def pack(
        cls, counts: Sequence[Sequence[int] | None], samples: NDArray[np.int64], index_hash: str
    ) -> CaptionTable:
        """Put what an index says of the captions into arrays.

        Args:
            counts: captions of each sample by shard; None where all samples have one.
            samples: of each shard.
            index_hash: of the index.
        """
        items = samples.copy()
        for shard, part in enumerate(counts):
            if part is not None:
                items[shard] = sum(part)
        lengths = np.array([0 if part is None else len(part) for part in counts], np.int64)
        starts = np.where([part is None for part in counts], -1, np.cumsum(lengths) - lengths)
        most = max((max(part, default=0) for part in counts if part is not None), default=0)
        parts = [np.array(part, np.min_scalar_type(most)) for part in counts if part is not None]
        arrays = {
            "items": items,
            "starts": starts.astype(np.int64),
            "counts": np.concatenate(parts) if parts else np.zeros(0, np.uint8),
        }
        return cls(SharedArrays.pack({"index_sha256": index_hash}, arrays))

    def locate(self, shard: int, item: int, samples: int) -> tuple[int, int]:
        """The sample that caption `item` of a shard of `samples` belongs to, and which of its
        captions that is.

        Raises:
            ValueError: a cached index contradicts itself.
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
        """Raises ValueError where arrays from a file don't fit shards of `samples`."""
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
    """The shards that `folder`/index.json names, out of the cached table where there is one.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it can't be read, or shards lack some of the columns.
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
    """Captions per sample from `folder`/index.json, or from its cached table if there is one.

    Raises:
        ValueError: the index does not say it.
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
    """A cached table that was made of the index in `folder`; None where there is none, or where it
    has to be made again."""
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
    """The fields of an index's entry that most shards of a set share."""
    return {
        "version": mds.VERSION,
        "format": "mds",
        "compression": compression,
        "column_names": list(columns.names),
        "column_encodings": list(columns.encodings),
        "column_sizes": columns.sizes,
    }


def _require_types(arrays: SharedArrays, **kinds: str) -> None:
    """Raises ValueError for an array that is not of its kind: `i` signed, `u` unsigned integers."""
    for name, kind in kinds.items():
        if arrays[name].dtype.kind != kind:
            raise ValueError(f"array {name} is of type {arrays[name].dtype}")


def _ends(texts: Sequence[bytes]) -> NDArray[Any]:
    """Where each text ends in all of them joined."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return ends.astype(np.uint32) if not len(ends) or ends[-1] < 1 << 32 else ends
