"""How many samples the recipe's streams hold: counted where they lie here, published otherwise."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blip_scale.config.recipe import Recipe
from blip_scale.data.loading.mixing import samples_per_epoch
from blip_scale.data.shards import read_caption_counts
from blip_scale.storage.untrusted import parse_json

PUBLISHED = {
    "coco": 113_000,
    "visual_genome": 100_000,
    "sbu": 860_000,
    "conceptual_captions_3m": 3_000_000,
    "conceptual_captions_12m": 10_000_000,
    "laion": 115_000_000,
}
"""Images of the published sets by stream name (Li et al. 2022, table 15)."""
PUBLISHED_CAPTIONS = {"coco": 5 * 113_000, "visual_genome": 821_000}
"""Their captions, where an image has several; Visual Genome's as in BLIP's list."""

SAMPLE_BYTES = 30_000
"""A sample in its shard, where nothing is there to be measured: a JPEG of web size with caption."""


@dataclass(frozen=True)
class Volume:
    """What an epoch reads and what has to be stored."""

    samples: int
    """Images of all streams together."""
    stored_bytes: float
    samples_per_epoch: int
    sample_bytes: float
    notes: list[str]


def volume_of(
    recipe: Recipe, sample_bytes: float | None = None, unknown: int | None = None
) -> Volume:
    """Samples and bytes of the training streams.

    Args:
        sample_bytes: of a sample of those that are not here; None takes SAMPLE_BYTES.
        unknown: images of a stream that is neither here nor published; None refuses it.

    Raises:
        ValueError: a stream is neither here nor one of the published sets.
    """
    samples, items, stored, notes, published = 0, [], 0.0, [], []
    each = sample_bytes or SAMPLE_BYTES
    for index, stream in enumerate(recipe.data.streams):
        places = [place for place in (stream.remote, stream.local) if place]  # or its cache
        folders = (Path(os.path.expandvars(place)).expanduser() for place in places)
        by_caption = stream.repeat == "captions"
        found = next(filter(None, (_count(folder, by_caption) for folder in folders)), None)
        if found is None:
            if stream.name not in PUBLISHED and unknown is None:
                raise ValueError(
                    f"data.streams.{index} ({stream.name}): no index.json at "
                    f"{stream.remote or stream.local}, and no published set has that name; give "
                    f"data.streams.{index}.local=FOLDER"
                )
            published.append(stream.name)
            images = PUBLISHED.get(stream.name, unknown or 0)
            captions = PUBLISHED_CAPTIONS.get(stream.name, images)
            found = images, captions if by_caption else images, images * each
        samples += found[0]
        items.append(found[1])
        stored += found[2]
    if published:
        notes.append(
            f"published numbers of images, {each / 1e3:.0f} kB each, for what is not here: "
            + ", ".join(published)
        )
    counts = samples_per_epoch(recipe.data, items)
    return Volume(samples, stored, sum(counts), stored / samples if samples else each, notes)


def _count(folder: Path, by_caption: bool) -> tuple[int, int, float] | None:
    """Samples, what an epoch takes of them (captions, if it goes by them) and bytes, as the index
    in a folder says."""
    file = folder / "index.json"
    if not file.is_file():
        return None
    try:
        shards = parse_json(file.read_bytes())["shards"]
        size = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)
        samples = [shard["samples"] for shard in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not an index of MDS shards ({error!r})") from error
    items = samples
    if by_caption:
        counts = zip(samples, read_caption_counts(folder), strict=True)
        items = [sum(part) if part else whole for whole, part in counts]
    return sum(samples), sum(items), float(size)
