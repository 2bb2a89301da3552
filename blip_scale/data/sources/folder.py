"""Read a folder of images with captions in a table (captions.csv, ...) or in .txt files.

A table has a row per image and caption. It has a column `image` (or file_name, path, ...) with a
path relative to the table's folder, a column `caption` (or text, ...), and optionally url and
similarity. Rows of the same image become one record. Subfolders may have their own tables, as in
Hugging Face's ImageFolder. Without a table, every image below the folder is read, and the whole of
its .txt is its caption.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import xxhash

from blip_scale.data.conversion.fingerprints import of_files
from blip_scale.data.conversion.lists import in_chunks, joint_chunks, listed
from blip_scale.data.conversion.pairs import (
    LARGEST_FILE_BYTES,
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
    Unused,
)
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.metadata import TEXT_ENDINGS, as_text
from blip_scale.data.sources.tables import Table
from blip_scale.storage.locations import (
    Entry,
    FileTooLarge,
    NotRegularFile,
    basename,
    extension,
    is_folder,
    join,
    list_folder,
    read_file,
)

TABLES = (
    "captions.csv", "captions.tsv", "captions.jsonl",
    "metadata.csv", "metadata.tsv", "metadata.jsonl",
)  # fmt: skip


def chunks(source: Source, encoding: str = "", columns: str = "") -> Iterable[Chunk]:
    """Chunks of the rows of the tables, or of the images of the folder.

    Raises:
        ValueError: a table can't be read.
        FileNotFoundError: there is no image.
    """
    if not is_folder(source.location):
        table = Table.open(source, source.location, encoding, columns)
        return in_chunks(
            listed(table.read, table.is_streamed, source.scratch), source.pairs_per_chunk
        )
    files = list_folder(source.location, deep=True)
    tables = _tables(files)
    if not tables:
        return _image_chunks(source, files)
    lists = []
    named = bytearray()

    def note(pair: RawPair) -> None:
        if isinstance(pair.image, str):
            named.extend(_digest(pair.image))

    for folder, entry in tables.items():
        images = join(source.images, folder) if source.images and folder else source.images
        here = replace(source, images=images)
        table = Table.open(here, entry.location, encoding, columns, folder)
        lists.append(listed(table.read, table.is_streamed, source.scratch, note))
    unused: list[Found] = [*_unnamed(files, set(tables.values()), named)]
    return joint_chunks([*lists, unused], source.pairs_per_chunk)


def _tables(files: Iterable[Entry]) -> dict[str, Entry]:
    """Folder -> its table, for folders that have one."""
    tables: dict[str, Entry] = {}
    for name in reversed(TABLES):
        for file in files:
            if basename(file.name) == name:
                tables[posixpath.dirname(file.name)] = file
    return dict(sorted(tables.items()))


def _digest(location: str) -> bytes:
    """8 bytes by which a file is recognised."""
    path = posixpath.normpath(location)
    return xxhash.xxh3_64_digest(path.encode("utf-8", "surrogatepass"))


def _unnamed(files: Iterable[Entry], tables: set[Entry], named: bytearray) -> list[Unused]:
    """Count the files that no table names; `named` are the digests of those that one names."""
    others = [file for file in files if file not in tables]
    digests = b"".join(_digest(file.location) for file in others)
    is_named = np.isin(np.frombuffer(digests, np.uint64), np.frombuffer(named, np.uint64))
    rest = [others[number] for number in np.flatnonzero(~is_named).tolist()]
    images = [file for file in rest if extension(file.name) in IMAGE_ENDINGS]
    counts = _by_ending(file for file in rest if extension(file.name) not in IMAGE_ENDINGS)
    return [*([Unused("images that no table names", len(images))] if images else []), *counts]


def _by_ending(files: Iterable[Entry]) -> list[Unused]:
    """Count files by ending."""
    endings = Counter(extension(file.name) for file in files)
    unused = []
    for ending, count in sorted(endings.items()):
        kind = f"files .{ending}" if ending else "files without an ending"
        unused.append(Unused(kind, count))
    return unused


def _image_chunks(source: Source, files: Sequence[Entry]) -> Iterator[Chunk]:
    images = [file for file in files if extension(file.name) in IMAGE_ENDINGS]
    texts = {file.name: file for file in files if extension(file.name) in TEXT_ENDINGS}
    if not images:
        listing = ", ".join(f"{count.count} {count.kind}" for count in _by_ending(files))
        raise FileNotFoundError(
            f"{source.location}: there is no image, but {listing or 'nothing'}; the sources laion "
            "and webdataset read tars and parquet files"
        )
    by_stem = {_stem(name): file for name, file in reversed(texts.items())}
    beside: dict[str, Entry] = {}
    for image in images:
        text = by_stem.get(_stem(image.name)) or by_stem.get(image.name)
        if text is not None:
            beside[image.name] = text
    used = {text.name for text in beside.values()}
    orphans = [file for name, file in texts.items() if name not in used]
    others = [file for file in files if extension(file.name) not in (*IMAGE_ENDINGS, *TEXT_ENDINGS)]
    stems = {_stem(file.name): file.name for file in others}
    rest: list[Found] = [_orphan(text, stems) for text in orphans]
    for start in range(0, len(images), source.pairs_per_chunk):
        part = images[start : start + source.pairs_per_chunk]
        is_last = start + len(part) == len(images)
        read = [*part]
        read += [beside[image.name] for image in part if image.name in beside]
        read += orphans if is_last else []
        yield Chunk(
            name=f"{start} to {start + len(part) - 1}",
            read=partial(
                read_images, part, {i.name: beside[i.name] for i in part if i.name in beside},
                [*rest, *_by_ending(others)] if is_last else [],
            ),
            fingerprint=of_files(read),
            pairs=len(part) + (len(rest) if is_last else 0),
        )  # fmt: skip


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _orphan(text: Entry, stems: Mapping[str, str]) -> Reject:
    other = stems.get(_stem(text.name))
    detail = "a caption without an image"
    if other:
        detail = f"a caption beside {other}, whose ending is not that of an image"
    return Reject(text.name, Reason.MISSING_IMAGE, detail, captions=1)


def read_images(
    images: Iterable[Entry], texts: Mapping[str, Entry], rest: Iterable[Found]
) -> Iterator[Found]:
    """Yield images with the texts beside them, then the items in `rest`."""
    for image in images:
        text: str | bytes | None = None
        if image.name in texts:
            try:
                text = as_text(read_file(texts[image.name].location, LARGEST_FILE_BYTES))
            except (NotRegularFile, FileNotFoundError, PermissionError) as error:
                is_file = not isinstance(error, NotRegularFile)
                reason = Reason.MISSING_CAPTION if is_file else Reason.NOT_REGULAR
                yield Reject(image.name, reason, str(error), captions=1)
                continue
            except FileTooLarge as error:
                yield Reject(image.name, Reason.FILE_TOO_LARGE, str(error), captions=1)
                continue
        yield RawPair(image.name, image.location, text, from_folder=True)
    yield from rest
