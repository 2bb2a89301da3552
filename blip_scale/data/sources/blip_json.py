"""Read the lists that Salesforce published for BLIP: JSON lists of {image or url, caption}.

`caption` is a text or a list of texts. Items with the same image become one record. Items with only
a URL are downloaded one by one and need --allow-outside. This is practical for some thousands of
images. For the bootstrapped lists of millions, download the images with img2dataset, and convert
its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from blip_scale.data.conversion.pairs import Chunk, Source
from blip_scale.data.sources.annotations import json_files, pair_of_item
from blip_scale.data.sources.json_lists import JsonList, pairs_in_chunks


def chunks(source: Source) -> Iterator[Chunk]:
    """Return the chunks of all lists at the source.

    Raises:
        ValueError: a file does not hold a list.
    """
    files = json_files(source.location)
    return pairs_in_chunks(
        source, [(JsonList.open(file), partial(pair_of_item, source, file)) for file in files]
    )
