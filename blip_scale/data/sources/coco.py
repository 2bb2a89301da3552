"""Read COCO captions in any of the published formats.

- Karpathy's dataset_coco.json (dataset_flickr30k.json has the same format).
- The lists that BLIP publishes for its splits.
- COCO's own annotations (captions_val2014.json, also for NoCaps).

A record is an image with its five captions. The split train joins Karpathy's train and restval
(113,287 images), as usual in the literature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from blip_scale.data.conversion.lists import spooled_chunks
from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
)
from blip_scale.data.sources import blip_json
from blip_scale.data.sources.annotations import image_location, read_item, read_items
from blip_scale.data.sources.json_lists import JsonObject, is_array
from blip_scale.data.sources.metadata import note_of
from blip_scale.storage.locations import basename, is_folder, join

_SPLITS = {"train": {"train", "restval"}, "val": {"val"}, "test": {"test"}}


def chunks(source: Source, split: str = "") -> Iterator[Chunk]:
    """Return the chunks of one annotation file, or of the dataset_coco.json in a folder.

    Args:
        source: the input.
        split: part of dataset_coco.json: train, val or test; "" for all parts.

    Raises:
        ValueError: the split or the format is unknown.
    """
    if is_folder(source.location):
        source = replace(source, location=join(source.location, "dataset_coco.json"))
    if is_array(source.location):
        if split:
            raise ValueError(f"{source.location} is the list of one split: leave --split out")
        return blip_json.chunks(source)
    content = JsonObject.open(source.location)
    parts = _Parts.of(content) if content else _Parts()
    if content is None or "images" not in parts.lists:
        note = note_of(parts.names) if content else "no object"
        raise ValueError(
            f"{source.location} is neither dataset_coco.json nor a list of captions ({note})"
        )
    if split and split not in _SPLITS:
        raise ValueError(f"--split {split}: COCO has {', '.join(_SPLITS)}")
    if "annotations" in parts.lists:
        if split:
            raise ValueError(f"{source.location} holds only one split: leave --split out")
    elif parts.has_sentences:
        return spooled_chunks(_karpathy(source, content.items("images"), split), source)
    elif "annotations" in parts.names:
        raise ValueError(f"{source.location}: its annotations are no list")
    # A file without annotations is a test set: image_info_test2014.json, nocaps_test_...
    if parts.annotation and not parts.has_captions:
        raise ValueError(
            f"{source.location} holds no captions but {parts.annotation} (an instances or "
            "keypoints file?): give captions_*.json"
        )
    return spooled_chunks(_own_format(source, content), source)


@dataclass
class _Parts:
    """Summary of the content of an annotation file."""

    names: list[str] = field(default_factory=list)
    lists: set[str] = field(default_factory=set)
    has_sentences: bool = False
    has_captions: bool = False
    annotation: str = ""
    """Keys of the first annotation."""

    @classmethod
    def of(cls, content: JsonObject) -> _Parts:
        """Read the whole file, which also checks that it is valid JSON."""
        parts = cls()
        for name, number, value in content.read():
            if number < 0:
                parts.names.append(name)
                parts.lists |= {name} if isinstance(value, list) else set()
            elif name == "images":
                parts.has_sentences |= isinstance(value, dict) and "sentences" in value
            elif name == "annotations":
                parts.has_captions |= isinstance(value, dict) and "caption" in value
                if not number:
                    parts.annotation = (
                        note_of(value) if isinstance(value, dict) else type(value).__name__
                    )
        return parts


def _own_format(source: Source, content: JsonObject) -> Iterator[Found]:
    """Read COCO's own format, which stores captions separately and refers to images by id."""
    captions: dict[str, list[Any]] = {}
    for item in content.items("annotations"):
        caption = item.get("caption") if isinstance(item, dict) else None
        image_id = str(item.get("image_id")) if isinstance(item, dict) else ""
        captions.setdefault(image_id, []).append(caption)
    images = content.items("images")
    yield from read_items(source.location, images, partial(_image, source, captions))
    for image_id, orphans in captions.items():  # `_image` has removed the captions of images
        detail = f"no image has the id {image_id} that {len(orphans)} annotations name"
        for _ in orphans:
            place = f"{basename(source.location)}: image_id {image_id}"
            yield Reject(place, Reason.MISSING_IMAGE, detail, captions=1)


def _image(source: Source, captions: dict[str, list[Any]], number: int, image: Any) -> Found:
    if "file_name" not in image or "id" not in image:
        place = f"{basename(source.location)}:{number}"
        return Reject(place, Reason.MISSING_KEY, f"file_name, id; {note_of(image)}")
    texts = captions.pop(str(image["id"]), [])
    fields = {key: image[key] for key in ("id", "domain") if key in image}
    path = image["file_name"]
    location = image_location(source, source.location, path)
    return RawPair(path, location, texts, annotations=[fields] * len(texts))


def _karpathy(source: Source, images: Iterable[Any], split: str) -> Iterator[Found]:
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
