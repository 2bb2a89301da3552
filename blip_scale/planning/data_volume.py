"""Number of samples of the recipe's streams: counted if local, else the published number."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blip_scale.config.recipe import Recipe
from blip_scale.data.loading.mixing import samples_per_epoch
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.reading.cache import TAR_INDEX, TAR_LIST
from blip_scale.data.shards import read_caption_counts
from blip_scale.storage.untrusted import parse_json

PUBLISHED = {
    "coco": 113_000,
    "visual_genome": 100_000,
    "sbu": 860_000,
    "conceptual_captions_3m": 3_000_000,
    "conceptual_captions_12m": 10_000_000,
    "laion": 115_000_000,
    "flickr30k": 29_000,
    "vqa_train": 82_783,
    "vqa_val": 40_504,
    "vg_qa": 108_077,
    "nlvr2_train": 86_373,
    "visdial_train": 123_287,
}
"""Number of images of the published sets, by stream name. Source: Li et al. 2022, table 15; for
fine-tuning, the publications of the sets. NLVR2 counts sentences, each about a pair of images."""
PUBLISHED_CAPTIONS = {
    "coco": 5 * 113_000,
    "visual_genome": 821_000,
    "flickr30k": 145_000,
    "vqa_train": 443_757,
    "vqa_val": 214_354,
    "vg_qa": 1_445_322,
    "visdial_train": 10 * 123_287,
}
"""Number of captions, questions or dialog rounds of published sets with several per image. For
Visual Genome: BLIP's list of captions, and the questions of the set."""

SAMPLE_BYTES = 30_000
"""Assumed bytes per sample of streams that are not local: a web JPEG and a caption."""


@dataclass(frozen=True)
class Volume:
    """Size of the data: samples per epoch, and bytes to store."""

    samples: int
    """Number of images of all streams together."""
    stored_bytes: float
    samples_per_epoch: int
    sample_bytes: float
    notes: list[str]


def volume_of(
    recipe: Recipe, sample_bytes: float | None = None, unknown: int | None = None
) -> Volume:
    """Samples and bytes of the training streams.

    Args:
        recipe: the recipe.
        sample_bytes: bytes per sample of streams that are not local. None: SAMPLE_BYTES.
        unknown: number of images assumed for a stream that is neither local nor published. None
            refuses such streams.

    Raises:
        ValueError: a stream is neither local nor one of the published sets.
    """
    samples, items, stored, notes, published = 0, [], 0.0, [], []
    each = sample_bytes or SAMPLE_BYTES
    for index, stream in enumerate(recipe.data.streams):
        by_caption = stream.repeat == "captions"
        counts = None
        for place in filter(None, (stream.remote, stream.local)):  # local may be a cache
            folder = Path(os.path.expandvars(place)).expanduser()
            counts = counts or _count(folder, by_caption)
        if counts is None:
            if stream.name not in PUBLISHED and unknown is None:
                raise ValueError(
                    f"data.streams.{index} ({stream.name}): no index.json at "
                    f"{stream.remote or stream.local}, and no published set has that name; give "
                    f"data.streams.{index}.local=FOLDER"
                )
            published.append(stream.name)
            images = PUBLISHED.get(stream.name, unknown or 0)
            captions = PUBLISHED_CAPTIONS.get(stream.name, images)
            counts = images, captions if by_caption else images, images * each
        samples += counts[0]
        items.append(counts[1])
        stored += counts[2]
    if published:
        notes.append(
            f"published numbers of images, {each / 1e3:.0f} kB each, for what is not here: "
            + ", ".join(published)
        )
    per_epoch = sum(samples_per_epoch(recipe.data, items))
    return Volume(samples, stored, per_epoch, stored / samples if samples else each, notes)


def _count(folder: Path, by_caption: bool) -> tuple[int, int, float] | None:
    """Read samples, items (samples or captions) and bytes from the index of a folder.

    Return None if the folder has no index.
    """
    file = folder / INDEX_NAME
    if not file.is_file() and (folder / TAR_INDEX).is_dir():
        folder = folder / TAR_INDEX
        file = folder / TAR_LIST / INDEX_NAME
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
