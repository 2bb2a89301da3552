"""Read Visual Genome's region descriptions, or BLIP's vg_caption.json.

A record is an image with the phrases of all its regions. The input is a folder with
region_descriptions.json, image_data.json, VG_100K and VG_100K_2, or a JSON list of {image,
caption}.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from blip_scale.data.sources.annotations import read_items
from blip_scale.data.sources.json_lists import JsonList
from blip_scale.data.sources.metadata import note_of
from blip_scale.storage.locations import is_folder, join

REGIONS = "region_descriptions.json"
IMAGES = "image_data.json"


def chunks(source: Source) -> Iterator[Chunk]:
    """Return the chunks of the regions in a folder, or of a list."""
    if not is_folder(source.location):
        return blip_json.chunks(source)
    return spooled_chunks(_regions(source), source)


def _regions(source: Source) -> Iterator[Found]:
    described = _items(source, REGIONS, "{id, regions}")
    urls = {}
    for item in _items(source, IMAGES, "{image_id, url}"):
        if isinstance(item, dict):
            urls[str(item.get("image_id"))] = item.get("url")
    yield from read_items(REGIONS, described, partial(_entry, source, urls))


def _items(source: Source, name: str, content: str) -> Iterator[Any]:
    items = JsonList.open(join(source.location, name), content).read()
    return (item for _, _, item in items)


def _entry(source: Source, urls: dict[str, Any], number: int, entry: Any) -> Found:
    regions = entry.get("regions")
    # Newer releases store the image's id beside the regions, older ones only in each region.
    image_id = entry.get("id", entry.get("image_id"))
    if image_id is None and regions:
        image_id = regions[0].get("image_id")
    if image_id is None or regions is None:
        note = f"id or regions; {note_of(entry)}"
        return Reject(f"{REGIONS}:{number}", Reason.MISSING_KEY, note, captions=len(regions or []))
    phrases = [region.get("phrase") for region in regions]
    if str(image_id) not in urls:
        detail = f"not in {IMAGES}"
        return Reject(str(image_id), Reason.MISSING_IMAGE, detail, captions=len(phrases))
    return _pair(source, image_id, urls[str(image_id)] or "", phrases)


def _pair(source: Source, image_id: Any, url: str, phrases: list[Any]) -> RawPair:
    # .../VG_100K_2/1.jpg: folders on the disk have the same names as on the server.
    path = "/".join(url.split("/")[-2:]) or f"VG_100K/{image_id}.jpg"
    return RawPair(str(image_id), join(source.images or source.location, path), phrases, url)
