"""Read Flickr30k: results_20130124.token, or results.csv from copies on the web.

A line of the .token file is `IMAGE#NUMBER<tab>caption`. A line of results.csv has image, number and
caption, separated by vertical bars. A record is an image with its five captions. The images are
read from --images. By default, they are beside the list, or in a folder flickr30k-images,
flickr30k_images or images beside it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace

from blip_scale.data.conversion.lists import StreamedList, in_chunks
from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Reason, Reject, Source
from blip_scale.data.conversion.spool import Spool
from blip_scale.data.sources.annotations import image_location
from blip_scale.storage.locations import (
    basename,
    extension,
    is_folder,
    join,
    list_folder,
    open_file,
    parent,
)

_TRIED = 20
"""Number of lines. If none of them has an image and a caption, the file has another format."""
_LISTS = (".token", "results.csv")
_IMAGES = ("flickr30k-images", "flickr30k_images", "images")


def chunks(source: Source) -> Iterator[Chunk]:
    """Return the chunks of one list, or of the list in a folder.

    Raises:
        FileNotFoundError: the folder has no list.
        ValueError: the file has another format.
    """
    location = source.location
    if is_folder(location):
        lists = [e.location for e in list_folder(location) if e.name.endswith(_LISTS)]
        if not lists:
            raise FileNotFoundError(f"{location}: there is no *.token and no results.csv")
        location = lists[0]
    if not source.images:
        folders = [e.name for e in list_folder(parent(location)) if e.is_folder]
        inner = next((name for name in _IMAGES if name in folders), "")
        source = replace(source, images=join(parent(location), inner) if inner else "")
    return in_chunks(
        StreamedList(Spool.of(_read(source, location), source.scratch)), source.pairs_per_chunk
    )


def _read(source: Source, location: str) -> Iterator[Found]:
    with open_file(location) as file:
        lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n")
        yield from _pairs(source, location, lines, extension(location) == "csv")


def _pairs(source: Source, location: str, lines: Iterable[str], is_table: bool) -> Iterator[Found]:
    read = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (is_table and number == 1):
            continue
        image, caption = (_split_table if is_table else _split_token)(line.rstrip("\r\n"))
        if image and caption is not None:
            yield RawPair(image, image_location(source, location, image), caption)
            read += 1
            continue
        if number > _TRIED and not read:
            raise ValueError(f"{location}:{number} is not a line of Flickr30k: {line[:80]!r}")
        place = f"{basename(location)}:{number}"
        yield Reject(
            place, Reason.DAMAGED_INPUT, f"no image and caption: {line.strip()}", captions=1
        )


def _split_token(line: str) -> tuple[str, str | None]:
    name, tab, caption = line.partition("\t")
    return name.rpartition("#")[0].strip(), caption if tab else None


def _split_table(line: str) -> tuple[str, str | None]:
    # In the copies on the web, one row lacks the second vertical bar.
    name, bar, rest = line.partition("|")
    number, second, caption = rest.partition("|")
    if not second:
        number, _, caption = rest.strip().partition(" ")
    return name.strip(), caption.strip() if bar and number.strip().isdigit() else None
