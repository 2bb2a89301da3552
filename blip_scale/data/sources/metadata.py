"""Names that data sets use: keys of JSON files, columns of tables, endings of files."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from blip_scale.data.captions import RoleText, parse_roles
from blip_scale.data.conversion.pairs import RawPair
from blip_scale.storage import untrusted

TEXT_ENDINGS = ("txt", "text", "caption")
CAPTION_KEYS = (
    "caption", "captions", "text", "txt", "TEXT", "re_caption", "recaption", "alt_text",
    "top_caption", "all_captions", "blip_caption", "sentence", "sentences", "description",
)  # fmt: skip
"""Names of captions, of which the first with a value is used. LAION-COCO has `TEXT`, `top_caption`
and `all_captions`, Recap-DataComp `re_caption`, others `alt_text`."""
_DATA_URL = re.compile(rb"data:image/[\w.+-]+;base64,")
_BASE64_STARTS = (b"/9j/", b"iVBORw0KGgo", b"UklGR", b"R0lGOD", b"Qk0", b"SUkqA", b"TU0AK")
"""First characters of JPEG, PNG, WebP, GIF, BMP and TIFF files in base64."""
_SHORTEST_BASE64 = 100  # characters; a path is shorter, and no image is
_INNER_KEYS = ("raw", "caption", "text", "sentence")
"""Keys of the text in a caption that is an object."""
URL_KEYS = ("url", "URL", "image_url")
ID_KEYS = ("key", "__key__", "id", "image_id", "img_id", "uid")
SIMILARITY_KEYS = ("similarity", "SIMILARITY", "clip_similarity")


def first_of(fields: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Value of the first key that exists and is not None."""
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


def caption_keys(chosen: str) -> tuple[str, ...]:
    """Keys to search for captions: the user's (see `captions.parse_roles`), else the usual ones."""
    return tuple(key for _, key in parse_roles(chosen)) if chosen else CAPTION_KEYS


def captions_of(fields: Mapping[str, Any], chosen: str) -> Any:
    """Captions of a record: one text, a list of texts, or None.

    Of the usual keys, the first with a value is used. Each of the user's keys gives a `RoleText`
    for each of its texts. Lists of lists are flattened, objects such as {raw: ...} give their text,
    and bytes are decoded.
    """
    empty: Any = None
    pairs = parse_roles(chosen) if chosen else [("", key) for key in CAPTION_KEYS]
    named: list[RoleText] = []
    for role, key in pairs:
        captions = _plain(fields.get(key))
        if captions in (None, "", []):
            empty = captions if empty is None else empty
            continue
        if not chosen:
            return captions
        texts = captions if isinstance(captions, list) else [captions]
        named += [RoleText(role, text) for text in texts]
    return named or empty


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return as_text(value)
    if isinstance(value, Mapping):
        text = first_of(value, _INNER_KEYS)
        return dict(value) if text is None else _plain(text)
    if not isinstance(value, list | tuple):
        return value
    flat: list[Any] = []
    for item in map(_plain, value):
        if isinstance(item, list):
            flat += item
        else:
            flat.append(item)
    return flat


def id_of(fields: Mapping[str, Any]) -> str:
    """Id of a record, or "" if it has none. An id of 7.0, as in tables with gaps, becomes 7."""
    value = first_of(fields, ID_KEYS)
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        value = int(value) if value.is_integer() else value
    return "" if value is None else str(value)


def embedded_image(data: str | bytes) -> bytes | None:
    """Decode an image that a text or bytes hold as base64; None if they hold none."""
    text = data if isinstance(data, bytes) else data[:64].encode("utf-8", "replace")
    match = _DATA_URL.match(text)
    start = match.end() if match else 0
    if not text[start:].startswith(_BASE64_STARTS) or len(data) < _SHORTEST_BASE64:
        return None
    try:
        return base64.b64decode(data[start:])
    except ValueError:
        return None


def note_of(fields: Iterable[str], kind: str = "keys") -> str:
    """List the fields of a record, for a message about a missing one."""
    names = ", ".join(map(str, fields))
    return f"{kind}: {names}" if names else f"no {kind}"


def pair_of(
    name: str, image: bytes | str | None, captions: Any, fields: Mapping[str, Any]
) -> RawPair:
    """Build a pair with url and similarity from `fields`."""
    url = first_of(fields, URL_KEYS)
    return RawPair(
        name, image, captions, url if isinstance(url, str) else "", _similarity(fields),
        note=note_of(fields), uid=_text_at(fields, "uid"), sha256=_text_at(fields, "sha256"),
    )  # fmt: skip


def _text_at(fields: Mapping[str, Any], key: str) -> str | None:
    """Text of a key: "" if it holds something else, None if there is no such key."""
    value = fields.get(key)
    return value if isinstance(value, str) else "" if key in fields else None


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse the JSON file of an image; {} if it is not an object."""
    try:
        fields = untrusted.parse_json(data)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def as_text(data: bytes) -> str | bytes:
    """Decode UTF-8. Other bytes stay bytes, which are rejected later."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data


def _similarity(fields: Mapping[str, Any]) -> float | None:
    try:
        value = float(first_of(fields, SIMILARITY_KEYS))
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(value) else value
