"""Read captions without images from parquet, JSON lines or tars, to join them to images by key."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blip_scale.data.conversion.pairs import RawPair, Reason, Reject
from blip_scale.data.sources.json_lists import ListFile
from blip_scale.data.sources.metadata import (
    ID_KEYS,
    UID_KEYS,
    URL_KEYS,
    AmbiguousKey,
    caption_keys,
    captions_of,
    first_of,
    id_of,
    key_text,
    uid_key,
)
from blip_scale.data.sources.parquet import check_columns
from blip_scale.data.sources.webdataset import TAR_ENDINGS, read_tar, without_ending
from blip_scale.storage.locations import (
    Entry,
    NotRegularFile,
    basename,
    is_folder,
    list_folder,
    open_file,
)
from blip_scale.storage.objects import RemoteError
from blip_scale.storage.untrusted import parse_json

KEYS = ("id", "uid", "url", "sha256")
"""Columns by which captions and images can be joined."""
_PARQUET = (".parquet", ".parq")
_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_ROWS = 1024  # rows per parquet batch
_LONGEST_LINE = 64 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionFiles:
    """Locations and format of captions."""

    locations: tuple[str, ...]
    """Files and folders."""
    key: str
    """Column to join captions and images by, one of `KEYS`."""
    caption_key: str
    """Keys of the captions with their roles (see `captions.parse_roles`)."""
    key_column: str = ""
    """Name of the key column, if it is not one of the usual names."""
    tar_ids: bool = False
    """Whether ids from a tar begin with the name of the tar, like the ids of images from tars."""


@dataclass(frozen=True)
class KeyedCaptions:
    """The captions of one row."""

    place: str
    """File and row, for messages."""
    key: str
    """Key of the image; "" if the row has no key."""
    captions: list[Any]
    """Texts. Each may be a `RoleText`."""


def read_captions(files: CaptionFiles) -> Iterator[KeyedCaptions | Reject]:
    """Read all rows of all files, in the order of the file names.

    A damaged file yields the rows before the damage, then a reject.

    Raises:
        FileNotFoundError: a location has no file in a supported format.
        OSError: the disk or the network failed.
    """
    for location in files.locations:
        for name, place in _listed(location):
            lower = name.lower()
            if lower.endswith(_PARQUET):
                yield from _from_parquet(files, name, place)
            elif lower.endswith(_LINES):
                yield from _from_lines(files, name, place)
            else:
                yield from _from_tar(files, name, place)


def _listed(location: str) -> list[tuple[str, str]]:
    """Names and locations of the files to read."""
    endings = (*_PARQUET, *_LINES, *TAR_ENDINGS)
    entries: list[Entry] = list_folder(location, deep=True) if is_folder(location) else []
    places = [(entry.name, entry.location) for entry in entries] or [(basename(location), location)]
    chosen = [place for place in places if place[0].lower().endswith(endings)]
    if not chosen:
        raise FileNotFoundError(f"{location}: no captions in it ({', '.join(endings)})")
    others = [name for name, _ in places if not name.lower().endswith(endings)]
    if others:
        logger.warning(
            "%s: %d files are no parquet, JSON lines or tars and are not read, the first: %s",
            location, len(others), others[0],
        )  # fmt: skip
    return sorted(chosen)


def _from_parquet(
    files: CaptionFiles, name: str, location: str
) -> Iterator[KeyedCaptions | Reject]:
    import pyarrow

    try:
        with open_file(location) as file:
            from pyarrow.parquet import ParquetFile

            table = ParquetFile(file)
            columns = _columns(files, table.schema_arrow.names)
            check_columns(columns)
            row = 0
            for batch in table.iter_batches(_ROWS, columns=columns):
                for fields in batch.to_pylist():
                    yield _row(files, f"{name}[{row}]", fields)
                    row += 1
    except NotRegularFile as error:
        yield Reject(name, Reason.NOT_REGULAR, str(error))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, RemoteError) or (isinstance(error, OSError) and error.errno):
            raise  # the network or the disk failed, not the file
        yield Reject(name, Reason.DAMAGED_INPUT, str(error))


def _columns(files: CaptionFiles, names: list[str]) -> list[str]:
    """Return the columns that are needed, because a table may hold images too."""
    wanted = {
        *caption_keys(files.caption_key), *ID_KEYS, *UID_KEYS, *URL_KEYS, files.key,
        files.key_column,
    }  # fmt: skip
    return [name for name in names if name in wanted]


def _from_lines(files: CaptionFiles, name: str, location: str) -> Iterator[KeyedCaptions | Reject]:
    try:
        with ListFile.at(location).open() as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if not line.strip():
                    continue
                place = f"{name}:{number}"
                try:
                    fields = parse_json(line)
                except ValueError as error:
                    yield Reject(place, Reason.DAMAGED_INPUT, f"no JSON: {error}", captions=1)
                    continue
                if isinstance(fields, dict):
                    yield _row(files, place, fields)
                else:
                    detail = f"not an object but {type(fields).__name__}"
                    yield Reject(place, Reason.DAMAGED_INPUT, detail, captions=1)
    except NotRegularFile as error:
        yield Reject(name, Reason.NOT_REGULAR, str(error))
    except gzip.BadGzipFile as error:
        yield Reject(name, Reason.DAMAGED_INPUT, str(error))


def _from_tar(files: CaptionFiles, name: str, location: str) -> Iterator[KeyedCaptions | Reject]:
    prefix = f"{without_ending(name, TAR_ENDINGS)}/" if files.tar_ids else ""
    for item in read_tar(location, files.caption_key, prefix):
        if isinstance(item, Reject):
            yield item
        elif isinstance(item, RawPair):
            key = comparable(files.key, getattr(item, files.key) or "")
            yield KeyedCaptions(f"{name}, {item.id}", key, _texts(item.captions))


def _row(files: CaptionFiles, place: str, fields: Mapping[str, Any]) -> KeyedCaptions | Reject:
    captions = _texts(captions_of(fields, files.caption_key))
    try:
        return KeyedCaptions(place, _key(files, fields), captions)
    except AmbiguousKey as error:
        return Reject(place, Reason.MISSING_KEY, str(error), captions=len(captions))


def _texts(captions: Any) -> list[Any]:
    """Return the captions as a list. A row without captions gives [None], a missing caption."""
    return (captions if isinstance(captions, list) else [captions]) or [None]


def _key(files: CaptionFiles, fields: Mapping[str, Any]) -> str:
    """Return the key of a row as text (see `key_text`), or "" if the row has no key.

    Raises:
        AmbiguousKey: the value may stand for several keys.
    """
    if files.key_column:
        value = fields.get(files.key_column)
    elif files.key == "id":
        value = first_of(fields, ID_KEYS)
        if not (isinstance(value, float) and value.is_integer()):
            return id_of(fields)  # converted like the ids of images, which may hold a fraction
    elif files.key == "url":
        value = first_of(fields, URL_KEYS)
    else:
        value = fields.get(uid_key(fields) if files.key == "uid" else files.key)
    return comparable(files.key, key_text(files.key, value))


def comparable(key: str, value: str) -> str:
    """Normalise a key for comparison: hashes may be in upper or lower case."""
    return value.lower() if key == "sha256" else value
