"""A plain folder of images: captions in a table (captions.csv, captions.jsonl), else in a .txt
beside each image.

A table has a row an image and caption, with a column `image` (or file_name, path, ...: a path from
the folder on) and `caption` (or text, ...), and perhaps url and similarity; rows of the same image
become one record. In JSONL `caption` may be a list. Without a table every image below the folder is
taken, and the whole of its .txt is its caption.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from functools import partial

from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
    group_by_image,
    in_chunks,
)
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.annotations import pair_of_item
from blip_scale.data.sources.metadata import as_text
from blip_scale.storage.locations import (
    Entry,
    NotRegularFile,
    basename,
    extension,
    is_folder,
    list_folder,
    open_file,
    read_file,
)

TABLES = (
    "captions.csv", "captions.tsv", "captions.jsonl",
    "metadata.csv", "metadata.tsv", "metadata.jsonl",
)  # fmt: skip
_LONGEST_FIELD = 1 << 20  # csv's own limit of 128 kB stops at the first long text


def chunks(source: Source) -> Iterator[Chunk]:
    """The rows of the table, or the images of the folder, in chunks."""
    table = _table(source.location)
    if table:
        return in_chunks(group_by_image(read_table(source, table)), source.pairs_per_chunk)
    return _image_chunks(source)


def _table(location: str) -> str:
    if not is_folder(location):
        return location
    there = {entry.name: entry.location for entry in list_folder(location)}
    return next((there[name] for name in TABLES if name in there), "")


def read_table(source: Source, location: str) -> Iterator[Found]:
    """Every row; one that can't be read is a reject. Raises ValueError for an unknown kind."""
    with open_file(location) as file:
        kind = extension(location.removesuffix(".gz"))
        if kind == "jsonl":
            yield from _json_lines(source, location, file)
            return
        if kind not in ("csv", "tsv"):
            raise ValueError(f"{location} is neither a folder nor a .csv, .tsv or .jsonl table")
        csv.field_size_limit(_LONGEST_FIELD)
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, delimiter="\t" if kind == "tsv" else ",")
        for number, row in enumerate(rows, start=2):
            yield pair_of_item(source, location, number, row)


def _json_lines(source: Source, location: str, lines: Iterable[bytes]) -> Iterator[Found]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            yield Reject(f"{basename(location)}:{number}", Reason.DAMAGED_INPUT, str(error))
            continue
        yield pair_of_item(source, location, number, item)


def _image_chunks(source: Source) -> Iterator[Chunk]:
    files = list_folder(source.location, deep=True)
    texts = {file.name for file in files if extension(file.name) == "txt"}
    images = [file for file in files if extension(file.name) in IMAGE_ENDINGS]
    if not images:
        raise FileNotFoundError(f"{source.location}: there is no image")
    for start in range(0, len(images), source.pairs_per_chunk):
        part = images[start : start + source.pairs_per_chunk]
        yield Chunk(
            name=f"{start} to {start + len(part) - 1}",
            read=partial(read_images, part, texts & {_text_name(image) for image in part}),
            fingerprint=f"{sum(i.size for i in part)} bytes: {part[0].name} to {part[-1].name}",
            pairs=len(part),
        )


def read_images(images: list[Entry], texts: set[str]) -> Iterator[Found]:
    """Images with the text beside them; `texts` are the names of those that are there."""
    for image in images:
        name = _text_name(image)
        text = None
        if name in texts:
            try:
                text = as_text(read_file(image.location[: -len(image.name)] + name))
            except NotRegularFile as error:
                yield Reject(image.name, Reason.NOT_REGULAR, str(error))
                continue
        yield RawPair(image.name, image.location, text, from_folder=True)


def _text_name(image: Entry) -> str:
    return image.name.rpartition(".")[0] + ".txt"
