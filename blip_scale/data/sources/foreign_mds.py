"""Read MDS sets from other tools, with images and captions in any columns.

Shards may be compressed, in folders below the index, or in a bucket. For columns with unusual
names, set `--image-key` and `--caption-key`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from blip_scale.data.conversion.pairs import Chunk, Found, Reason, Reject, Source
from blip_scale.data.mds import INDEX_NAME, Shard, parse_shard
from blip_scale.data.pixels.decoding import describe
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources.annotations import IMAGE_KEYS, image_location
from blip_scale.data.sources.metadata import (
    captions_of,
    embedded_image,
    first_of,
    id_of,
    note_of,
    pair_of,
)
from blip_scale.storage.locations import join, read_file

_IMAGE_COLUMNS = (*IMAGE_ENDINGS, "image", "image_bytes", "img", "pixels", *IMAGE_KEYS)


def chunks(source: Source) -> Iterator[Chunk]:
    """Yield one chunk per shard.

    Raises:
        ValueError: the index can't be read, or has no column with images.
    """
    location = join(source.location, INDEX_NAME)
    try:
        index = json.loads(read_file(location))
        entries = index["shards"]
        shards = [parse_shard(Path(), entry) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{location} is not a valid MDS index ({error})") from error
    images = (source.image_key,) if source.image_key else _IMAGE_COLUMNS
    for entry, shard in zip(entries, shards, strict=True):
        columns = shard.columns.names
        if not set(images) & set(columns):
            note = note_of(columns, "columns")
            raise ValueError(f"{location}: no column with images ({note}): give --image-key")
        packed = shard.zip_data or shard.raw_data
        yield Chunk(
            shard.raw_data.basename,
            partial(read_shard, source, entry, images),
            json.dumps([packed.bytes, packed.hashes], sort_keys=True),
            shard.samples,
        )


def read_shard(source: Source, entry: dict[str, Any], images: tuple[str, ...]) -> Iterator[Found]:
    """Read every sample of a shard. Damaged samples and shards become rejects."""
    with tempfile.TemporaryDirectory(prefix="blip_scale_mds_") as made:
        shard = parse_shard(Path(made), entry)
        name = shard.raw_data.basename
        try:
            _unpack(source, shard)
        except ValueError as error:
            for index in range(shard.samples):
                yield Reject(f"{name}[{index}]", Reason.DAMAGED_INPUT, describe(error))
            return
        for index in range(shard.samples):
            place = f"{name}[{index}]"
            try:
                yield _pair(source, place, shard.read(index), images)
            except Exception as error:  # from decoding damaged bytes
                yield Reject(place, Reason.DAMAGED_INPUT, describe(error))


def _unpack(source: Source, shard: Shard) -> None:
    """Write the uncompressed shard to its folder."""
    target = shard.folder / shard.raw_data.basename
    target.parent.mkdir(parents=True, exist_ok=True)
    packed = shard.zip_data
    if packed is not None:
        try:
            data = read_file(join(source.location, packed.basename))
        except FileNotFoundError:
            packed = None  # the set was decompressed in place, as MosaicML's reader does
    if packed is None:
        data = read_file(join(source.location, shard.raw_data.basename))
    problem = (packed or shard.raw_data).difference(data)
    if problem:
        raise ValueError(problem)
    if packed is None:
        target.write_bytes(data)
    else:
        shard.decompress(data, target)


def _pair(source: Source, place: str, sample: dict[str, Any], images: tuple[str, ...]) -> Found:
    image = first_of(sample, images)
    if isinstance(image, str):
        image = embedded_image(image) or image_location(source, place, image)
    elif image is not None and not isinstance(image, bytes):
        kind = type(image).__name__
        return Reject(place, Reason.DAMAGED_INPUT, f"its image is {kind}; see --image-key")
    captions = captions_of(sample, source.caption_key)
    return pair_of(id_of(sample) or place, image, captions, sample)
