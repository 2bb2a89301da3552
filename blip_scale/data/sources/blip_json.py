"""Read the lists that Salesforce published for BLIP: JSON lists of {image or url, caption}.

`caption` is a text or a list of texts. Items of the same image become one record. Items with only a
url are downloaded one by one with --allow-outside, which suits some thousands. For the bootstrapped
lists of millions, download the images with img2dataset, and read its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from blip_scale.data.conversion.lists import START, Place, in_chunks, listed
from blip_scale.data.conversion.pairs import Chunk, Found, Source
from blip_scale.data.sources.annotations import json_files, pair_of_item, read_item
from blip_scale.data.sources.json_lists import JsonList


def chunks(source: Source) -> Iterator[Chunk]:
    """Chunks of all lists that `source` names.

    Raises:
        ValueError: a file does not hold a list.
    """
    files = [JsonList.open(location) for location in json_files(source.location)]
    is_streamed = all(file.form for file in files)
    pairs = listed(partial(read_lists, source, files), is_streamed)
    return in_chunks(pairs, source.pairs_per_chunk)


def read_lists(
    source: Source, files: Sequence[JsonList], start: Place
) -> Iterator[tuple[Place, Found]]:
    """Read every item from a place on.

    Raises:
        ValueError: a file does not hold a list.
    """
    for number in range(start.file, len(files)):
        location = files[number].file.location
        make = partial(pair_of_item, source, location)
        first = start if number == start.file else START
        for offset, index, item in files[number].read(first.offset, first.number):
            yield Place(number, offset, index), read_item(location, index, item, make)
