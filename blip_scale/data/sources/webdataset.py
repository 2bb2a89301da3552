"""Webdataset tars: consecutive files with the same name up to the first dot are a sample.

The image is the file with an image's ending; the caption is in the .txt (or .caption), else under a
usual key of the .json, which also holds url and similarity.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Reason, Reject, Source
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.metadata import (
    TEXT_ENDINGS,
    as_text,
    caption_keys,
    first_of,
    pair_of,
    parse_json,
)
from blip_scale.storage.locations import (
    Entry,
    NotRegularFile,
    basename,
    file_size,
    is_folder,
    list_folder,
    open_file,
)

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
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
    """All samples of a tar. A damaged one gives what is before the damage, then rejects: the sample
    that the damage may have cut, and the tar."""
    try:
        # As a stream: nothing is sought, so that it may come over a network.
        with (
            open_file(location) as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar,
        ):
            for name, parts, stored_bytes in _samples(tar):
                yield replace(sample_pair(name, parts, caption_key), stored_bytes=stored_bytes)
    except _CutSample as cut:
        yield Reject(cut.name, Reason.DAMAGED_INPUT, f"the tar is damaged here: {cut.__cause__}")
        yield Reject(basename(location), Reason.DAMAGED_INPUT, str(cut.__cause__))
    except NotRegularFile as error:
        yield Reject(basename(location), Reason.NOT_REGULAR, str(error))
    except _DAMAGE as error:
        yield Reject(basename(location), Reason.DAMAGED_INPUT, str(error))


class _CutSample(Exception):
    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class _Member(tarfile.TarInfo):
    """Takes nothing but the end mark for the end: tarfile also ends, and says nothing, at a damaged
    header and where a tar was cut off."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the end mark; the class isn't public
                raise
            place = f"byte {archive.offset}"
            raise tarfile.ReadError(f"no end mark but {error or 'nothing'} at {place}") from error


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """(name, content by ending, bytes in the tar) of each sample."""
    name, stored = "", 0
    parts: dict[str, bytes] = {}
    try:
        for member in tar:
            key, ending = _key(member)
            if not key:
                continue
            if parts and (key != name or ending in parts):
                yield name, parts, stored
                parts, stored = {}, 0
            name = key
            stored += tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE))
            content = tar.extractfile(member)
            if ending in _WANTED and content is not None:
                parts[ending] = b""  # the sample is begun, even if its content can't be read
                parts[ending] = content.read()
    except _DAMAGE as error:
        if parts:
            raise _CutSample(name) from error
        raise
    if parts:
        yield name, parts, stored


def _key(member: tarfile.TarInfo) -> tuple[str, str]:
    """The sample that a file belongs to ("" for none), and its ending there."""
    folder, slash, file_name = member.name.removeprefix("./").rpartition("/")
    stem, _, ending = file_name.partition(".")
    # Without a stem it is a hidden file, such as the ._000.jpg of a Mac.
    return (folder + slash + stem if stem and member.isfile() else ""), ending.lower()


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
