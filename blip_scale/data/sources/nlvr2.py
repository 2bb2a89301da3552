"""Read NLVR2's sentences about two images: nlvr_train.json, nlvr_dev.json and nlvr_test.json.

The files, as published by BLIP, are JSON lists of {images, sentence, label}: two paths, and "True"
or "False". A record is a pair of images with all its sentences. The annotation of each sentence
holds `label`, true or false.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from blip_scale.data.conversion.pairs import (
    Chunk,
    Found,
    RawPair,
    Reason,
    Reject,
    Source,
)
from blip_scale.data.sources.annotations import (
    image_id,
    image_location,
    json_files,
)
from blip_scale.data.sources.json_lists import JsonList, pairs_in_chunks
from blip_scale.data.sources.metadata import note_of
from blip_scale.storage.locations import basename

_LABELS = {"True": True, "False": False, "true": True, "false": False}


def chunks(source: Source) -> Iterator[Chunk]:
    """Return the chunks of all lists at the source."""
    lists = []
    for location in json_files(source.location):
        json_list = JsonList.open(location, "{images, sentence, label}")
        lists.append((json_list, partial(_pair, source, location)))
    return pairs_in_chunks(source, lists)


def _pair(source: Source, annotations: str, number: int, item: Any) -> Found:
    place = f"{basename(annotations)}:{number}"
    if not isinstance(item, dict):
        return Reject(place, Reason.DAMAGED_INPUT, f"not an object but {type(item).__name__}")
    missing = [key for key in ("images", "sentence", "label") if item.get(key) is None]
    if missing:
        note = f"{', '.join(missing)}; {note_of(item)}"
        return Reject(place, Reason.MISSING_KEY, note)
    paths = item["images"]
    is_two = isinstance(paths, list) and len(paths) == 2
    if not is_two or not all(isinstance(path, str) for path in paths):
        return Reject(place, Reason.BAD_ANNOTATION, "images are not two paths")
    label = item["label"] if isinstance(item["label"], bool) else _LABELS.get(str(item["label"]))
    if label is None:
        return Reject(place, Reason.BAD_ANNOTATION, f"label {item['label']!r}, not True or False")
    first, second = (image_location(source, annotations, path) for path in paths)
    name = " ".join(image_id(source, annotations, path) for path in paths)
    return RawPair(
        name, first, [item["sentence"]], annotations=[{"label": label}], second_image=second
    )
