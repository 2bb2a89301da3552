"""Parquet files with the encoded images in a column, as img2dataset and the Hugging Face hub have.

The image column is called after a format (`jpg`, `png`, ...) or `image`, and holds bytes or a
{bytes, path}; the other columns are named as in `metadata`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from blip_scale.data.conversion.pairs import Chunk, Found, Reason, Reject, Source
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.metadata import (
    SIMILARITY_KEYS,
    URL_KEYS,
    caption_keys,
    first_of,
    pair_of,
)
from blip_scale.data.sources.webdataset import file_chunk, find_files
from blip_scale.storage.locations import NotRegularFile, basename, open_file, stem
from blip_scale.storage.objects import RemoteError

_IMAGE_COLUMNS = (*IMAGE_ENDINGS, "image", "image_bytes")
_ID_COLUMNS = ("key", "__key__", "id", "image_id")
_ROWS = 64  # read at once


def chunks(source: Source) -> list[Chunk]:
    """Every parquet file below the folder, or the one file, is a chunk."""
    files = find_files(source.location, (".parquet",), deep=True)
    if not files:
        raise FileNotFoundError(f"{source.location}: there is no .parquet")
    return [
        file_chunk(file, partial(read_parquet, file.location, source.caption_key)) for file in files
    ]


def read_parquet(location: str, caption_key: str = "") -> Iterator[Found]:
    """All rows. A damaged file gives what is before the damage, then a reject.

    Raises ValueError for a file without images, as it is the wrong one.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        opened = open_file(location)
    except NotRegularFile as error:
        yield Reject(basename(location), Reason.NOT_REGULAR, str(error))
        return
    with opened as file:
        try:
            table = ParquetFile(file)
            columns = _columns(table.schema_arrow.names, location, caption_key)
            row = 0
            for batch in table.iter_batches(_ROWS, columns=columns):
                for fields in batch.to_pylist():
                    yield _pair(f"{stem(location)}/{row}", fields, caption_key)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, RemoteError) or (isinstance(error, OSError) and error.errno):
                raise  # the network's or the disk's fault, not the file's
            yield Reject(basename(location), Reason.DAMAGED_INPUT, str(error))


def _columns(names: list[str], location: str, caption_key: str) -> list[str]:
    if not set(names) & set(_IMAGE_COLUMNS):
        raise ValueError(
            f"{location} has no column with images (only {', '.join(names)}): if it is a list of "
            "URLs, fetch them with img2dataset first (docs/data.md has the command)"
        )
    wanted = (
        *_IMAGE_COLUMNS, *_ID_COLUMNS, *URL_KEYS, *SIMILARITY_KEYS, *caption_keys(caption_key),
        "error_message",
    )  # fmt: skip
    return [name for name in names if name in wanted]


def _pair(place: str, fields: dict[str, Any], caption_key: str) -> Found:
    name = first_of(fields, _ID_COLUMNS)
    name = place if name is None else str(name)
    image = first_of(fields, _IMAGE_COLUMNS)
    if isinstance(image, dict):
        image = image.get("bytes")
    if image is None and fields.get("error_message"):
        return Reject(name, Reason.MISSING_IMAGE, str(fields["error_message"]))
    return pair_of(name, image, first_of(fields, caption_keys(caption_key)), fields)
