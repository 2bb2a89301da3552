"""Read SBU captions from the output of img2dataset, or from the published lists and a folder.

Line i of SBU_captioned_photo_dataset_urls.txt and line i of ..._captions.txt belong together. An
image in --images is named by the last part of its URL (4385058960_b0f291553e.jpg). Without
--images, the images are downloaded one by one, which needs --allow-outside.
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
    """Chunks of img2dataset's output, or of the two lists.

    Raises:
        ValueError: the two lists differ in their number of lines.
    """
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
            f"{places[0]} has {len(urls)} lines but {places[1]} {len(captions)}: lines with the "
            "same number belong together, so one file is incomplete"
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
