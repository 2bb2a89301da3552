"""Read parquet files with images in a column, such as from img2dataset or the Hugging Face hub.

The image column is named after a format (`jpg`, `png`, ...) or `image`. It holds bytes, base64, a
path relative to --images (or to the file's folder), or a struct {bytes, path}. The module
`metadata` lists the names of the other columns. Rows with the same id and image become one record
with all their captions.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Reason, Reject, Source, Unused
from blip_scale.data.conversion.repeats import repeats
from blip_scale.data.pixels.decoding import describe
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.annotations import image_location
from blip_scale.data.sources.metadata import (
    ID_KEYS,
    SCORE_KEYS,
    UID_KEYS,
    URL_KEYS,
    caption_keys,
    captions_of,
    embedded_image,
    first_of,
    id_of,
    note_of,
    pair_of,
)
from blip_scale.data.sources.published import recognised
from blip_scale.data.sources.webdataset import (
    file_chunk,
    find_files,
    with_unused,
    without_ending,
)
from blip_scale.storage.locations import NotRegularFile, basename, open_file
from blip_scale.storage.objects import RemoteError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_ENDINGS = (".parquet", ".parq")
_IMAGE_COLUMNS = (*IMAGE_ENDINGS, "image", "image_bytes", "img", "image_path", "file_name")
_ROWS = 64  # rows per batch

_TAKEN: list[Any] = []

Row = dict[str, Any]


def chunks(source: Source) -> list[Chunk]:
    """Return one chunk per parquet file below the folder, or one for a single file."""
    files, others = find_files(source.location, _ENDINGS)
    if not files:
        raise FileNotFoundError(f"{source.location}: there is no .parquet")
    file_chunks = []
    for file in files:
        name = without_ending(file.name, _ENDINGS)
        file_chunks.append(file_chunk(file, partial(read_parquet, source, file.location, name)))
    return with_unused(file_chunks, others)


def read_parquet(source: Source, location: str, name: str) -> Iterator[Found]:
    """Read all rows. A damaged file yields the rows before the damage, then a reject.

    Args:
        source: the input.
        location: the file.
        name: path of the file in the set, without the ending.
    """
    import pyarrow

    try:
        opened = open_file(location)
    except NotRegularFile as error:
        yield Reject(basename(location), Reason.NOT_REGULAR, str(error))
        return
    with opened as file:
        from pyarrow.parquet import ParquetFile

        try:
            yield from _read(ParquetFile(file), source, location, name)
        except (pyarrow.ArrowException, RepeatedColumn, OSError) as error:
            if isinstance(error, RemoteError) or (isinstance(error, OSError) and error.errno):
                raise  # the network or the disk failed, not the file
            yield Reject(basename(location), Reason.DAMAGED_INPUT, str(error))


def _read(table: ParquetFile, source: Source, location: str, name: str) -> Iterator[Found]:
    names = table.schema_arrow.names
    images = _image_columns(table, source)
    if not images:
        yield Reject(basename(location), Reason.MISSING_KEY, _without_images(names))
        return
    if not table.metadata.num_rows:
        yield Unused(f"parquet files without rows ({note_of(names, 'columns')})")
        return
    wanted = {
        *images, *URL_KEYS, *SCORE_KEYS, *caption_keys(source.caption_key), *ID_KEYS, *UID_KEYS,
        "sha256", "error_message",
    }  # fmt: skip
    columns = [column for column in names if column in wanted]
    check_columns(columns)
    repeated = _repeated(table, columns, images, source)
    row = 0
    for batch in table.iter_batches(_ROWS, columns=columns):
        for fields in batch.to_pylist():
            place = f"{name}/{row}"
            row += 1
            try:
                item = _pair(source, location, place, fields, images, repeated)
            except Exception as error:  # a row may hold anything
                item = Reject(place, Reason.DAMAGED_INPUT, describe(error))
            if isinstance(item, RawPair):
                item = replace(item, note=note_of(names, "columns"))
            if item is not None:
                yield item


class RepeatedColumn(ValueError):
    """A parquet file has several columns with one name. All but one would be lost."""


def check_columns(columns: Sequence[str]) -> None:
    """Raise RepeatedColumn if a name occurs twice."""
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise RepeatedColumn(f"several of its columns have the name {twice[0]!r}: rename one")


def _without_images(names: list[str]) -> str:
    """Describe a table without images: its columns, and how to get the images."""
    columns = note_of(names, "columns")
    published = recognised(names)
    if published is not None:
        return (
            f"a list of URLs of {published.title}, without images: img2dataset --url_col "
            f"{published.url} --caption_col {published.captions[0]} (docs/data.md); {columns}"
        )
    return (
        "has no column with images: give --image-key or, for a list of URLs, download them with "
        f"img2dataset first (docs/data.md); {columns}"
    )


def _image_columns(table: ParquetFile, source: Source) -> tuple[str, ...]:
    """Return the columns with images. Without a usual name, the only bytes column is used."""
    import pyarrow

    schema = table.schema_arrow
    if source.image_key:
        return (source.image_key,) if source.image_key in schema.names else ()
    usual = tuple(column for column in _IMAGE_COLUMNS if column in schema.names)
    if usual:
        return usual

    def holds_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            inner = [kind.field(number) for number in range(kind.num_fields)]
            return any(part.name == "bytes" and holds_bytes(part.type) for part in inner)
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    captions = caption_keys(source.caption_key)
    unusual = [f.name for f in schema if holds_bytes(f.type) and f.name not in captions]
    return tuple(unusual) if len(unusual) == 1 else ()


def _repeated(
    table: ParquetFile, columns: list[str], images: tuple[str, ...], source: Source
) -> dict[tuple[str, str], list[Any]]:
    """Return the captions of images with several rows, by id and hash of the image.

    If no id occurs twice, only the ids are read.
    """
    id_columns = [column for column in columns if column in ID_KEYS]
    if not id_columns:
        return {}
    hashes = bytearray()
    for batch in table.iter_batches(columns=id_columns):
        for row_id in filter(None, map(id_of, batch.to_pylist())):
            hashes += _id_hash(row_id)
    later, _ = repeats(np.frombuffer(hashes, np.uint64))
    several = {bytes(hashes[8 * row : 8 * row + 8]) for row in later.tolist()}
    if not several:
        return {}
    captions: dict[tuple[str, str], list[Any]] = {}
    for batch in table.iter_batches(_ROWS, columns=columns):
        for fields in batch.to_pylist():
            row_id = id_of(fields)
            if row_id and _id_hash(row_id) in several:
                texts = captions_of(fields, source.caption_key)
                image_captions = captions.setdefault((row_id, _image_hash(fields, images)), [])
                image_captions += texts if isinstance(texts, list) else [texts]
    return captions


def _id_hash(row_id: str) -> bytes:
    return xxhash.xxh3_64_digest(row_id.encode("utf-8", "surrogatepass"))


def _image_hash(fields: Row, images: tuple[str, ...]) -> str:
    image = _plain(first_of(fields, images))
    data = image.encode("utf-8", "surrogatepass") if isinstance(image, str) else image
    return xxhash.xxh3_128_hexdigest(data) if isinstance(data, bytes) else ""


def _plain(image: Any) -> Any:
    """Return the bytes or path of an image. Unwrap {bytes, path} and lists with one item."""
    if isinstance(image, list) and len(image) == 1:
        return _plain(image[0])
    if isinstance(image, dict):
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return image


def _pair(
    source: Source,
    location: str,
    place: str,
    fields: Row,
    images: tuple[str, ...],
    repeated: dict[tuple[str, str], list[Any]],
) -> Found | None:
    """Build the pair of a row. Return None if an earlier row already has its captions."""
    row_id, folder = id_of(fields), posixpath.dirname(place.rpartition("/")[0])
    captions = captions_of(fields, source.caption_key)
    key = (row_id, _image_hash(fields, images))
    if key in repeated:
        captions, repeated[key] = repeated[key], _TAKEN
        if captions is _TAKEN:
            return None
    name = posixpath.join(folder, row_id) if row_id else place
    image = _plain(first_of(fields, images))
    if image is None and fields.get("error_message"):
        count = len(captions) if isinstance(captions, list) else int(captions is not None)
        return Reject(name, Reason.MISSING_IMAGE, str(fields["error_message"]), captions=count)
    if isinstance(image, str | bytes):
        embedded = embedded_image(image)
        if embedded is None and isinstance(image, str):
            image = image_location(source, location, image)
        else:
            image = embedded or image
    elif image is not None:
        return Reject(name, Reason.DAMAGED_INPUT, f"its image is {type(image).__name__}")
    return pair_of(name, image, captions, fields)
