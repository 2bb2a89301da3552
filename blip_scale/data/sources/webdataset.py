"""Webdataset tars: consecutive files with the same name up to the first dot are a sample.

The image is the file with an image's ending; the caption is in the .txt (or .caption), else under a
usual key of the .json, which also holds url and similarity.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from blip_scale.data.conversion import Chunk, Found, RawPair, Reason, Reject, Source
from blip_scale.data.conversion.locations import (
    Entry,
    basename,
    file_size,
    is_folder,
    list_folder,
    open_file,
)
from blip_scale.data.sources.metadata import (
    IMAGE_ENDINGS,
    TEXT_ENDINGS,
    as_text,
    caption_keys,
    first_of,
    pair_of,
    parse_json,
)

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_WANTED = {*IMAGE_ENDINGS, *TEXT_ENDINGS, "json"}


def chunks(source: Source) -> list[Chunk]:
    """Every tar below the folder, or the one tar, is a chunk."""
    tars = find_files(source.location, TAR_ENDINGS, deep=True)
    if not tars:
        raise FileNotFoundError(f"{source.location}: there is no .tar")
    return [file_chunk(tar, partial(read_tar, tar.location, source.caption_key)) for tar in tars]


def find_files(location: str, endings: tuple[str, ...], deep: bool = False) -> list[Entry]:
    """Files of a folder by their endings; a location that is a file is taken as it is."""
    if not is_folder(location):
        return [Entry(basename(location), location, False, file_size(location))]
    listed = list_folder(location, deep)
    return [e for e in listed if not e.is_folder and e.name.lower().endswith(endings)]


def file_chunk(entry: Entry, read: partial[Iterator[Found]]) -> Chunk:
    """A chunk that is a file."""
    return Chunk(entry.name, read, f"{entry.size} bytes", input_bytes=entry.size)


def read_tar(location: str, caption_key: str = "") -> Iterator[Found]:
    """All samples of a tar. A damaged one gives what is before the damage, then a reject."""
    with open_file(location) as file:
        try:
            # As a stream: nothing is sought, so that it may come over a network.
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                for name, parts, stored_bytes in _samples(tar):
                    pair = sample_pair(name, parts, caption_key)
                    yield replace(pair, stored_bytes=stored_bytes)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            yield Reject(basename(location), Reason.DAMAGED_INPUT, str(error))


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """(name, content by ending, bytes in the tar) of each sample."""
    name, stored = "", 0
    parts: dict[str, bytes] = {}
    for member in tar:
        if not member.isfile():
            continue
        folder, slash, file_name = member.name.removeprefix("./").rpartition("/")
        stem, _, ending = file_name.partition(".")
        if not stem:  # hidden files, such as ._000.jpg of a Mac
            continue
        key, ending = folder + slash + stem, ending.lower()
        if parts and (key != name or ending in parts):
            yield name, parts, stored
            parts, stored = {}, 0
        name = key
        stored += tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE))
        content = tar.extractfile(member)
        if ending in _WANTED and content is not None:
            parts[ending] = content.read()
    if parts:
        yield name, parts, stored


def sample_pair(name: str, parts: dict[str, bytes], caption_key: str = "") -> RawPair:
    """The pair of a sample's files, by their endings."""
    fields = parse_json(parts.get("json", b""))
    image = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
    text = next((parts[ending] for ending in TEXT_ENDINGS if ending in parts), None)
    if caption_key or text is None:
        captions = first_of(fields, caption_keys(caption_key))
    else:
        captions = as_text(text)
    return pair_of(name, image, captions, fields)
