"""Read the lists that Salesforce published for BLIP: JSON lists of {image or url, caption}.

`caption` is a text or a list of texts. Items of the same image become one record. Items with only a
url are downloaded one by one with --allow-outside, which suits some thousands. For the bootstrapped
lists of millions, download the images with img2dataset, and read its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from blip_scale.data.conversion.lists import group_by_image, in_chunks
from blip_scale.data.conversion.pairs import Chunk, Found, Source
from blip_scale.data.sources.annotations import json_files, load_list, pair_of_item, read_items


def chunks(source: Source) -> Iterator[Chunk]:
    """Chunks of all lists that `source` names."""
    return in_chunks(group_by_image(read_lists(source)), source.pairs_per_chunk)


def read_lists(source: Source) -> Iterator[Found]:
    """Read every item.

    Raises:
        ValueError: a file does not hold a list.
    """
    for location in json_files(source.location):
        items = load_list(location, "{image, caption}")
        yield from read_items(location, items, partial(pair_of_item, source, location))
