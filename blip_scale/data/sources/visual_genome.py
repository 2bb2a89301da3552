"""Read Visual Genome's region descriptions, or vg_caption.json as BLIP uses it.

A record is an image with the phrases of all its regions. The input is a folder with
region_descriptions.json, image_data.json, VG_100K and VG_100K_2, or a JSON list of {image,
caption}.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from blip_scale.data.sources.annotations import load_json, read_items
from blip_scale.data.sources.metadata import note_of
from blip_scale.storage.locations import is_folder, join

REGIONS = "region_descriptions.json"
IMAGES = "image_data.json"


def chunks(source: Source) -> Iterator[Chunk]:
    """Chunks of the regions of a folder, or of a list."""
    if not is_folder(source.location):
        return blip_json.chunks(source)
    return in_chunks(list(_regions(source)), source.pairs_per_chunk)


def _regions(source: Source) -> Iterator[Found]:
    described = load_json(join(source.location, REGIONS))
    images = {str(item.get("image_id")): item for item in load_json(join(source.location, IMAGES))}
    yield from read_items(REGIONS, described, partial(_entry, source, images))


def _entry(source: Source, images: dict[Any, dict[str, Any]], number: int, entry: Any) -> Found:
    regions = entry.get("regions")
    # Newer releases store the image's id beside the regions, older ones only in each region.
    image_id = entry.get("id", entry.get("image_id"))
    if image_id is None and regions:
        image_id = regions[0].get("image_id")
    if image_id is None or regions is None:
        note = f"id or regions; {note_of(entry)}"
        return Reject(f"{REGIONS}:{number}", Reason.MISSING_KEY, note, captions=len(regions or []))
    image = images.get(str(image_id))
    phrases = [region.get("phrase") for region in regions]
    if image is None:
        detail = f"not in {IMAGES}"
        return Reject(str(image_id), Reason.MISSING_IMAGE, detail, captions=len(phrases))
    return _pair(source, image_id, image, phrases)


def _pair(source: Source, image_id: Any, image: dict[str, Any], phrases: list[Any]) -> RawPair:
    url = image.get("url") or ""
    # .../VG_100K_2/1.jpg: folders on the disk have the same names as on the server.
    path = "/".join(url.split("/")[-2:]) or f"VG_100K/{image_id}.jpg"
    return RawPair(str(image_id), join(source.images or source.location, path), phrases, url)
