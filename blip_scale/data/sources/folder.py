"""Read a folder of images with captions in a table (captions.csv, ...) or in .txt files.

A table has one row per image and caption. Its column `image` (or file_name, path, ...) holds a path
relative to the table's folder. Its column `caption` (or text, ...) holds the caption. The columns
url and similarity are optional. Rows with the same image become one record. Subfolders may have
their own tables, as in Hugging Face's ImageFolder. Without a table, all images below the folder are
read, and the content of an image's .txt is its caption.
"""

from __future__ import annotations

import posixpath
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat

import numpy as np
import xxhash
from numpy.typing import NDArray

from blip_scale.data.conversion.fingerprints import of_files
from blip_scale.data.conversion.listing import FileIndex, Listing
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
    read_file,
)

TABLES = (
    "captions.csv", "captions.tsv", "captions.jsonl",
    "metadata.csv", "metadata.tsv", "metadata.jsonl",
)  # fmt: skip
_BLOCK = 4096  # files that are looked up together
_NONE = -1


def chunks(source: Source, encoding: str = "", columns: str = "") -> Iterable[Chunk]:
    """Return the chunks of the rows of all tables, or of the images in the folder.

    Raises:
        ValueError: a table can't be read.
        FileNotFoundError: the folder has no image.
    """
    try:
        b" ".decode(encoding or "utf-8", "ignore")
    except LookupError as error:
        raise ValueError(f"--encoding {encoding}: {error}") from error
    if not is_folder(source.location):
        table = Table.open(source, source.location, encoding, columns)
        return in_chunks(
            listed(table.read, table.is_streamed, source.scratch), source.pairs_per_chunk
        )
    files = Listing.of(source.location, source.scratch)
    tables = _tables(files)
    if not tables:
        return _image_chunks(source, files, encoding)
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
    unused: list[Found] = [*_unnamed(files, {entry.name for entry in tables.values()}, named)]
    return joint_chunks([*lists, unused], source.pairs_per_chunk)


def _tables(files: Listing) -> dict[str, Entry]:
    """Map each folder that has a table to this table."""
    tables: dict[str, Entry] = {}
    for file in files:
        folder, name = posixpath.split(file.name)
        if name in TABLES:
            other = tables.get(folder)
            if other is None or TABLES.index(name) < TABLES.index(basename(other.name)):
                tables[folder] = file
    return dict(sorted(tables.items()))


def _digest(location: str) -> bytes:
    """Return an 8-byte hash of a file's normalised location."""
    path = posixpath.normpath(location)
    return xxhash.xxh3_64_digest(path.encode("utf-8", "surrogatepass"))


def _unnamed(files: Listing, tables: set[str], named: bytearray) -> list[Unused]:
    """Count the files that are in no table. `named` holds the digests of files in tables."""
    digests = np.sort(np.frombuffer(named, np.uint64))
    endings: Counter[str] = Counter()
    others = (file for file in files if file.name not in tables)
    while block := list(islice(others, _BLOCK)):
        wanted = np.frombuffer(b"".join(_digest(file.location) for file in block), np.uint64)
        places = np.searchsorted(digests, wanted)
        for file, digest, place in zip(block, wanted, places.tolist(), strict=True):
            if place == len(digests) or digests[place] != digest:
                endings[extension(file.name)] += 1
    images = sum(endings.pop(ending, 0) for ending in IMAGE_ENDINGS)
    counts = _counted(endings)
    return [*([Unused("images that no table names", images)] if images else []), *counts]


def _counted(endings: Mapping[str, int]) -> list[Unused]:
    """Return the numbers of files by ending as unused items."""
    unused = []
    for ending, count in sorted(endings.items()):
        kind = f"files .{ending}" if ending else "files without an ending"
        unused.append(Unused(kind, count))
    return unused


def _image_chunks(source: Source, files: Listing, encoding: str) -> Iterator[Chunk]:
    endings = Counter(extension(file.name) for file in files)
    count = sum(endings[ending] for ending in IMAGE_ENDINGS)
    if not count:
        listing = ", ".join(f"{kind.count} {kind.kind}" for kind in _counted(endings))
        raise FileNotFoundError(
            f"{source.location}: there is no image, but {listing or 'nothing'}; the sources laion "
            "and webdataset read tars and parquet files"
        )
    for ending in (*IMAGE_ENDINGS, *TEXT_ENDINGS):
        endings.pop(ending, None)
    texts = FileIndex(files, _stem_of_text)
    is_used = np.zeros(len(texts), np.bool_)
    images = ((c, file) for c, file in files.items() if extension(file.name) in IMAGE_ENDINGS)
    start = 0
    while part := list(islice(images, source.pairs_per_chunk)):
        beside = array("q")
        for _, image in part if len(texts) else ():
            position = _beside(texts, image.name)
            beside.append(_NONE if position is None else int(texts.codes[position]))
            if position is not None:
                is_used[position] = True
        stop = start + len(part)
        read = ImagesInFolder(files, part[0][0], len(part), beside, encoding)
        if stop == count:
            read.orphans = np.sort(texts.codes[~is_used])
            read.others = _others(files, read.orphans, texts)
            read.unused = _counted(endings)
        captions = (files.entry(code) for code in beside if code != _NONE)
        orphans = (files.entry(code) for code in read.orphans.tolist())
        yield Chunk(
            name=f"{start} to {stop - 1}",
            read=read,
            fingerprint=of_files(chain((image for _, image in part), captions, orphans)),
            pairs=len(part) + len(read.orphans),
        )
        start = stop


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _stem_of_text(name: str) -> str | None:
    return _stem(name) if extension(name) in TEXT_ENDINGS else None


def _beside(texts: FileIndex, image: str) -> int | None:
    """Return the position of an image's text: for a.jpg, first try a.txt, then a.jpg.txt."""
    return next(chain(texts.positions(_stem(image)), texts.positions(image)), None)


def _others(files: Listing, orphans: NDArray[np.int64], texts: FileIndex) -> NDArray[np.int64]:
    """Find, for each text without an image, a file of another kind with the same stem.

    Return the code of the last such file, or _NONE if there is none.
    """
    others = np.full(len(orphans), _NONE)
    for code, file in files.items() if len(orphans) else ():
        if extension(file.name) in (*IMAGE_ENDINGS, *TEXT_ENDINGS):
            continue
        for position in texts.positions(_stem(file.name)):
            place = int(np.searchsorted(orphans, texts.codes[position]))
            if place < len(orphans) and orphans[place] == texts.codes[position]:
                others[place] = code
    return others


@dataclass
class ImagesInFolder:
    """Consecutive images of a folder with their texts. The last part also has unused files."""

    files: Listing
    start: int
    """Code of the first image."""
    count: int
    texts: array[int]
    """Code of each image's text, or _NONE; empty if the folder has no texts."""
    encoding: str = ""
    """Encoding of texts without a byte order mark; "" for UTF-8."""
    orphans: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Codes of texts without an image."""
    others: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """See `_others`."""
    unused: list[Unused] = field(default_factory=list)

    def __call__(self) -> Iterator[Found]:
        """Yield the images, then texts without an image, then unused files."""
        images = (f for _, f in self.files.items(self.start) if extension(f.name) in IMAGE_ENDINGS)
        texts = self.texts or repeat(_NONE)
        for image, code in zip(islice(images, self.count), texts):  # noqa: B905  see `repeat`
            yield self._pair(image, None if code == _NONE else self.files.entry(code))
        for code, beside in zip(self.orphans.tolist(), self.others.tolist(), strict=True):
            detail = "a caption without an image"
            if beside != _NONE:
                other = self.files.entry(beside).name
                detail = f"a caption beside {other}, whose ending is not that of an image"
            name = self.files.entry(code).name
            yield Reject(name, Reason.MISSING_IMAGE, detail, captions=1)
        yield from self.unused

    def _pair(self, image: Entry, text: Entry | None) -> Found:
        caption: str | bytes | None = None
        if text is not None:
            try:
                caption = as_text(read_file(text.location, LARGEST_FILE_BYTES), self.encoding)
            except UnicodeDecodeError as error:
                detail = f"{basename(text.name)} is not {self.encoding}: {error}; see --encoding"
                return Reject(image.name, Reason.CAPTION_NO_TEXT, detail, captions=1)
            except (NotRegularFile, FileNotFoundError, PermissionError) as error:
                is_file = not isinstance(error, NotRegularFile)
                reason = Reason.MISSING_CAPTION if is_file else Reason.NOT_REGULAR
                return Reject(image.name, reason, str(error), captions=1)
            except FileTooLarge as error:
                return Reject(image.name, Reason.FILE_TOO_LARGE, str(error), captions=1)
        return RawPair(image.name, image.location, caption, from_folder=True)
