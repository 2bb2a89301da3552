"""SBU captions: what img2dataset fetched, or the published pair of lists and a folder of images.

Line i of SBU_captioned_photo_dataset_urls.txt and of ..._captions.txt belong together. The images
lie in --images under the last part of their URL (4385058960_b0f291553e.jpg); without --images they
are fetched one by one, which --allow-outside permits.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

from blip_scale.data.conversion.lists import group_by_image, in_chunks
from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Source
from blip_scale.data.sources import img2dataset
from blip_scale.data.sources.annotations import image_location
from blip_scale.storage.locations import basename, is_folder, join, list_folder, open_file, parent

URLS = "SBU_captioned_photo_dataset_urls.txt"
CAPTIONS = "SBU_captioned_photo_dataset_captions.txt"


def chunks(source: Source) -> Iterable[Chunk]:
    """Raises ValueError for two lists that do not have the same number of lines."""
    folder = source.location
    if not is_folder(folder):
        if basename(folder) not in (URLS, CAPTIONS):
            return img2dataset.chunks(source)
        folder = parent(folder)
    if URLS not in {entry.name for entry in list_folder(folder)}:
        return img2dataset.chunks(source)
    places = [join(folder, name) for name in (URLS, CAPTIONS)]
    urls, captions = map(_lines, places)
    if len(urls) != len(captions):
        raise ValueError(
            f"{places[0]} has {len(urls)} lines and {places[1]} {len(captions)}: line i of both "
            "belong together, so one of them is cut"
        )
    pairs: list[Found] = []
    for url, caption in zip(urls, captions, strict=True):
        name = basename(url)
        image = image_location(source, places[0], name) if source.images else url
        pairs.append(RawPair(name, image, caption, url))
    return in_chunks(group_by_image(pairs), source.pairs_per_chunk)


def _lines(location: str) -> list[str]:
    with open_file(location) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="\n").read()
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
