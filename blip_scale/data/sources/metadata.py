"""What the sets call the same things: keys of JSON files, columns of tables, endings of files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from blip_scale.data.conversion.pairs import RawPair
from blip_scale.storage import untrusted

TEXT_ENDINGS = ("txt", "text", "caption")
CAPTION_KEYS = ("caption", "captions", "text", "txt", "TEXT")
URL_KEYS = ("url", "URL", "image_url")
SIMILARITY_KEYS = ("similarity", "SIMILARITY", "clip_similarity")


def first_of(fields: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first key that is there and not None."""
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


def caption_keys(chosen: str) -> tuple[str, ...]:
    """Where to look for the caption: where the user says, else at the usual places."""
    return (chosen,) if chosen else CAPTION_KEYS


def pair_of(
    name: str, image: bytes | str | None, captions: Any, fields: Mapping[str, Any]
) -> RawPair:
    """A pair with url and similarity out of `fields`."""
    url = first_of(fields, URL_KEYS)
    return RawPair(name, image, captions, url if isinstance(url, str) else "", _similarity(fields))


def parse_json(data: bytes) -> dict[str, Any]:
    """The object in a JSON file beside an image; {} for anything else."""
    try:
        fields = untrusted.parse_json(data)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def as_text(data: bytes) -> str | bytes:
    """Decoded; bytes that are no UTF-8 stay bytes, which are rejected later."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data


def _similarity(fields: Mapping[str, Any]) -> float | None:
    try:
        value = float(first_of(fields, SIMILARITY_KEYS))
    except (TypeError, ValueError):
        return None
    return None if math.isnan(value) else value
