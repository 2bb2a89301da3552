"""COCO captions: Karpathy's dataset_coco.json (dataset_flickr30k.json has the same form), the lists
that BLIP publishes for its splits, or COCO's own annotations (captions_val2014.json, and those of
NoCaps).

A record is an image with its five captions. `split` train is Karpathy's train and restval together
(113,287 images), as everywhere in the literature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
    in_chunks,
)
from blip_scale.data.sources import blip_json
from blip_scale.data.sources.annotations import image_location, load_json
from blip_scale.storage.locations import basename, is_folder, join

_SPLITS = {"train": {"train", "restval"}, "val": {"val"}, "test": {"test"}}


def chunks(source: Source, split: str = "") -> Iterator[Chunk]:
    """Chunks of one annotation file, or of the dataset_coco.json in a folder.

    `split` is a part of dataset_coco.json: train, val or test; "" takes all of it. Raises
    ValueError for an unknown one.
    """
    if is_folder(source.location):
        source = replace(source, location=join(source.location, "dataset_coco.json"))
    annotations = load_json(source.location)
    if isinstance(annotations, list):
        if split:
            raise ValueError(f"{source.location} is the list of one split: leave --split out")
        return blip_json.chunks(source)
    if not isinstance(annotations, dict) or not isinstance(annotations.get("images"), list):
        raise ValueError(f"{source.location} is neither dataset_coco.json nor a list of captions")
    if split and split not in _SPLITS:
        raise ValueError(f"--split {split}: COCO has {', '.join(_SPLITS)}")
    if isinstance(annotations.get("annotations"), list):
        if split:
            raise ValueError(f"{source.location} is all of one split: leave --split out")
        return in_chunks(list(_own_format(source, annotations)), source.pairs_per_chunk)
    return in_chunks(list(_karpathy(source, annotations["images"], split)), source.pairs_per_chunk)


def _own_format(source: Source, annotations: dict[str, Any]) -> Iterator[Found]:
    """Captions of an image stand apart from it, and name its id."""
    captions: dict[Any, list[Any]] = {}
    for annotation in annotations["annotations"]:
        captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
    for number, image in enumerate(annotations["images"]):
        if "file_name" not in image or "id" not in image:
            yield Reject(
                f"{basename(source.location)}:{number}", Reason.MISSING_KEY, "file_name, id"
            )
            continue
        own = captions.get(image["id"], [])
        known = {key: image[key] for key in ("id", "domain") if key in image}
        path = image["file_name"]
        location = image_location(source, source.location, path)
        yield RawPair(path, location, own, annotations=[known] * len(own))


def _karpathy(source: Source, images: list[dict[str, Any]], split: str) -> Iterator[Found]:
    wanted = _SPLITS.get(split)
    for number, image in enumerate(images):
        if wanted is not None and image.get("split") not in wanted:
            continue
        missing = [key for key in ("filename", "sentences") if key not in image]
        if missing:
            place = f"{basename(source.location)}:{number}"
            yield Reject(place, Reason.MISSING_KEY, ", ".join(missing))
            continue
        path = join(image.get("filepath", ""), image["filename"])
        captions = [sentence.get("raw") for sentence in image["sentences"]]
        yield RawPair(path, image_location(source, source.location, path), captions)
