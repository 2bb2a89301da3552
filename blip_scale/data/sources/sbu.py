"""Read SBU captions from the output of img2dataset, or from the published lists and a folder.

Line i of SBU_captioned_photo_dataset_urls.txt and line i of ..._captions.txt belong together. An
image in --images is named by the last part of its URL (4385058960_b0f291553e.jpg). Without
--images, the images are downloaded one by one, which needs --allow-outside.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from blip_scale.data.conversion.lists import StreamedList, in_chunks
from blip_scale.data.conversion.pairs import Chunk, RawPair, Source
from blip_scale.data.conversion.spool import Spool
from blip_scale.data.sources import img2dataset
from blip_scale.data.sources.annotations import image_location
from blip_scale.storage.locations import basename, is_folder, join, list_folder, open_file, parent

URLS = "SBU_captioned_photo_dataset_urls.txt"
CAPTIONS = "SBU_captioned_photo_dataset_captions.txt"


def chunks(source: Source) -> Iterable[Chunk]:
    """Return the chunks of img2dataset's output, or of the two lists.

    Raises:
        ValueError: the two lists have different numbers of lines.
    """
    folder = source.location
    if not is_folder(folder):
        if basename(folder) not in (URLS, CAPTIONS):
            return img2dataset.chunks(source)
        folder = parent(folder)
    if URLS not in {entry.name for entry in list_folder(folder)}:
        return img2dataset.chunks(source)
    pairs = _pairs(source, join(folder, URLS), join(folder, CAPTIONS))
    return in_chunks(StreamedList(Spool.of(pairs, source.scratch)), source.pairs_per_chunk)


def _pairs(source: Source, urls: str, captions: str) -> Iterator[RawPair]:
    lines = zip_longest(_lines(urls), _lines(captions))
    for number, (url, caption) in enumerate(lines):
        if url is None or caption is None:
            rest = 1 + sum(1 for _ in lines)
            counts = (number, number + rest) if url is None else (number + rest, number)
            raise ValueError(
                f"{urls} has {counts[0]} lines but {captions} {counts[1]}: lines with the same "
                "number belong together, so one file is incomplete"
            )
        name = basename(url)
        image = image_location(source, urls, name) if source.images else url
        yield RawPair(name, image, caption, url)


def _lines(location: str) -> Iterator[str]:
    with open_file(location) as file:
        for line in io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n"):
            yield line.removesuffix("\n").rstrip("\r")
