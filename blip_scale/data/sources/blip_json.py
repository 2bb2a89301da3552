"""Read the lists that Salesforce published for BLIP: JSON lists of {image or url, caption}.

`caption` is a text or a list of texts. Items of the same image become one record. Items with only a
url are downloaded one by one with --allow-outside, which suits some thousands. For the bootstrapped
lists of millions, download the images with img2dataset, and read its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from blip_scale.data.conversion.pairs import Chunk, Source
from blip_scale.data.sources.annotations import json_files, pair_of_item
from blip_scale.data.sources.json_lists import JsonList, pairs_in_chunks


def chunks(source: Source) -> Iterator[Chunk]:
    """Chunks of all lists that `source` names.

    Raises:
        ValueError: a file does not hold a list.
    """
    files = json_files(source.location)
    return pairs_in_chunks(
        source, [(JsonList.open(file), partial(pair_of_item, source, file)) for file in files]
    )
