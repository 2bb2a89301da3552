"""Read COCO captions in any of their published forms.

These are Karpathy's dataset_coco.json (dataset_flickr30k.json has the same form), the lists that
BLIP publishes for its splits, and COCO's own annotations (captions_val2014.json, also for NoCaps).

A record is an image with its five captions. The split train is Karpathy's train and restval
together (113,287 images), as usual in the literature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from blip_scale.data.conversion.lists import in_chunks
from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
)
from blip_scale.data.sources import blip_json
from blip_scale.data.sources.annotations import image_location, load_json, read_item, read_items
from blip_scale.data.sources.json_lists import is_array
from blip_scale.data.sources.metadata import note_of
from blip_scale.storage.locations import basename, is_folder, join

_SPLITS = {"train": {"train", "restval"}, "val": {"val"}, "test": {"test"}}


def chunks(source: Source, split: str = "") -> Iterator[Chunk]:
    """Chunks of one annotation file, or of the dataset_coco.json in a folder.

    Args:
        source: the input.
        split: part of dataset_coco.json: train, val or test; "" for all of it.

    Raises:
        ValueError: the split or the format is unknown.
    """
    if is_folder(source.location):
        source = replace(source, location=join(source.location, "dataset_coco.json"))
    if is_array(source.location):
        if split:
            raise ValueError(f"{source.location} is the list of one split: leave --split out")
        return blip_json.chunks(source)
    annotations = load_json(source.location)
    if not isinstance(annotations, dict) or not isinstance(annotations.get("images"), list):
        content = note_of(annotations) if isinstance(annotations, dict) else "no object"
        raise ValueError(
            f"{source.location} is neither dataset_coco.json nor a list of captions ({content})"
        )
    if split and split not in _SPLITS:
        raise ValueError(f"--split {split}: COCO has {', '.join(_SPLITS)}")
    if isinstance(annotations.get("annotations"), list):
        if split:
            raise ValueError(f"{source.location} holds only one split: leave --split out")
        return in_chunks(list(_own_format(source, annotations)), source.pairs_per_chunk)
    images = annotations["images"]
    if not any(isinstance(image, dict) and "sentences" in image for image in images):
        # A test set without published captions: image_info_test2014.json, nocaps_test_...
        return in_chunks(list(_own_format(source, annotations)), source.pairs_per_chunk)
    return in_chunks(list(_karpathy(source, images, split)), source.pairs_per_chunk)


def _own_format(source: Source, content: dict[str, Any]) -> Iterator[Found]:
    """Read COCO's own format, whose captions are stored apart from images and name their ids."""
    annotations = content.get("annotations", [])
    texts = [item for item in annotations if isinstance(item, dict) and "caption" in item]
    if annotations and not texts:
        raise ValueError(
            f"{source.location} holds no captions but {_kinds(annotations)} (an instances or "
            "keypoints file?): give captions_*.json"
        )
    captions: dict[str, list[Any]] = {}
    for item in annotations:
        caption = item.get("caption") if isinstance(item, dict) else None
        image_id = str(item.get("image_id")) if isinstance(item, dict) else ""
        captions.setdefault(image_id, []).append(caption)
    yield from read_items(source.location, content["images"], partial(_image, source, captions))
    for image_id, orphans in captions.items():  # `_image` has removed the captions of images
        detail = f"no image has the id {image_id} that {len(orphans)} annotations name"
        for _ in orphans:
            place = f"{basename(source.location)}: image_id {image_id}"
            yield Reject(place, Reason.MISSING_IMAGE, detail, captions=1)


def _kinds(annotations: list[Any]) -> str:
    first = annotations[0]
    return note_of(first) if isinstance(first, dict) else type(first).__name__


def _image(source: Source, captions: dict[str, list[Any]], number: int, image: Any) -> Found:
    if "file_name" not in image or "id" not in image:
        place = f"{basename(source.location)}:{number}"
        return Reject(place, Reason.MISSING_KEY, f"file_name, id; {note_of(image)}")
    texts = captions.pop(str(image["id"]), [])
    fields = {key: image[key] for key in ("id", "domain") if key in image}
    path = image["file_name"]
    location = image_location(source, source.location, path)
    return RawPair(path, location, texts, annotations=[fields] * len(texts))


def _karpathy(source: Source, images: list[Any], split: str) -> Iterator[Found]:
    wanted = _SPLITS.get(split)
    for number, image in enumerate(images):
        if wanted is None or not isinstance(image, dict) or image.get("split") in wanted:
            yield read_item(source.location, number, image, partial(_listed_image, source))


def _listed_image(source: Source, number: int, image: Any) -> Found:
    missing = [key for key in ("filename", "sentences") if key not in image]
    if missing:
        place = f"{basename(source.location)}:{number}"
        return Reject(place, Reason.MISSING_KEY, f"{', '.join(missing)}; {note_of(image)}")
    path = join(image.get("filepath", ""), image["filename"])
    captions = [sentence.get("raw") for sentence in image["sentences"]]
    return RawPair(path, image_location(source, source.location, path), captions)
