"""The on-disk form of image-text pairs: a folder of MDS shards with an index.json.

Every sample has the four columns of `COLUMNS`: `id` (unique in its set), `image` (the encoded file:
JPEG, PNG, ...), `caption` (as found; it is cleaned when it is read) and `source` (where it is
from).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from streaming import MDSWriter
from streaming.base.format.mds import MDSReader

COLUMNS = {"id": "str", "image": "bytes", "caption": "str", "source": "str"}
INDEX_NAME = "index.json"
HASH = "xxh64"


@dataclass(frozen=True)
class Record:
    """One image-text pair as it is written."""

    id: str
    image: bytes
    """The encoded image file, not pixels."""
    caption: str
    source: str


def write_shards(
    folder: Path,
    records: Iterable[Record],
    shard_size: str = "64mb",
    compression: str | None = None,
) -> int:
    """Write `records` as MDS shards of at most `shard_size` into `folder`; returns their number.

    The shards go to `folder.partial`, which is renamed when all is written: `folder` is whole or
    not there. What an earlier, killed call left in `folder.partial` is thrown away. Raises
    FileExistsError where `folder` exists and ValueError for an empty set or an id seen twice.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    ids: set[str] = set()
    writer = MDSWriter(
        columns=COLUMNS,
        out=str(partial),
        compression=compression,
        hashes=[HASH],
        size_limit=shard_size,
    )
    with writer:
        for record in records:
            if record.id in ids:
                raise ValueError(f"{folder}: the id {record.id!r} comes twice; ids must be unique")
            ids.add(record.id)
            writer.write(asdict(record))
    if not ids:
        shutil.rmtree(partial)
        raise ValueError(f"{folder}: there is no record to write")
    partial.rename(folder)
    return len(ids)


def read_index(folder: Path) -> list[MDSReader]:
    """Readers of all shards that `folder`/index.json names, without opening the shards.

    Raises FileNotFoundError without an index, ValueError for one that can't be read or that
    doesn't have the columns of `COLUMNS`.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {INDEX_NAME} in {folder}")
    try:
        entries = json.loads(path.read_text())["shards"]
        readers = [MDSReader.from_json(str(folder), None, entry) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an MDS index ({error}); write the set again") from error
    for reader in readers:
        missing = set(COLUMNS) - set(reader.column_names)
        if missing:
            raise ValueError(f"{path}: the shards lack the columns {sorted(missing)}")
    return readers
