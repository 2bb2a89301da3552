"""Published sets and folders -> MDS shards.

A reader (one a data set, in `blip_scale.data.sources`) gives pairs as it finds them, in chunks;
everything else is here: screening, shards, restarts, several machines, the merge.
"""

from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reader,
    Reason,
    Reject,
    Screened,
    Source,
    group_by_image,
    in_chunks,
)
from blip_scale.data.conversion.run import Conversion, Part, Progress, convert, merge
from blip_scale.data.conversion.screening import Rules

__all__ = [
    "Chunk",
    "Conversion",
    "Found",
    "Part",
    "Progress",
    "RawPair",
    "Reader",
    "Reason",
    "Reject",
    "Rules",
    "Screened",
    "Source",
    "convert",
    "group_by_image",
    "in_chunks",
    "merge",
]
