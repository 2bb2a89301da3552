"""Names used in data sets: keys of JSON files, columns of tables, endings of files."""

from __future__ import annotations

import base64
import math
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from typing import Any

from blip_scale.data.captions import RoleText, parse_roles
from blip_scale.data.conversion.pairs import RawPair
from blip_scale.data.sources.published import SETS
from blip_scale.storage import untrusted

TEXT_ENDINGS = ("txt", "text", "caption")
_USUAL_CAPTION_KEYS = (
    "caption", "captions", "text", "txt", "TEXT", "re_caption", "recaption", "alt_text",
    "top_caption", "all_captions", "blip_caption", "sentence", "sentences", "description",
)  # fmt: skip
_SET_CAPTION_KEYS = [name for published in SETS.values() for name in published.captions]
CAPTION_KEYS = tuple(dict.fromkeys([*_USUAL_CAPTION_KEYS, *_SET_CAPTION_KEYS, "syn_text"]))
"""Names of captions; the first name with a value is used. img2dataset writes the column chosen with
--caption_col as `caption`."""
_DATA_URL = re.compile(rb"data:image/[\w.+-]+;base64,")
_BASE64_STARTS = (b"/9j/", b"iVBORw0KGgo", b"UklGR", b"R0lGOD", b"Qk0", b"SUkqA", b"TU0AK")
"""First characters of JPEG, PNG, WebP, GIF, BMP and TIFF files in base64."""
_SHORTEST_BASE64 = 100  # characters; paths are shorter, images are longer
_INNER_KEYS = ("raw", "caption", "text", "sentence")
"""Keys of the text, if a caption is an object."""
URL_KEYS = ("url", "URL", "image_url")
ID_KEYS = ("key", "__key__", "id", "image_id", "img_id", "uid")
_SET_SIMILARITY_KEYS = [name for published in SETS.values() for name in published.similarity]
SIMILARITY_KEYS = tuple(
    dict.fromkeys(["similarity", "SIMILARITY", "clip_similarity", *_SET_SIMILARITY_KEYS])
)
UNSAFE_KEYS = ("punsafe",)
WATERMARK_KEYS = ("pwatermark",)
WATERMARK_CLASS_KEYS = ("watermark_class_id", "watermark_class_score")
"""PixelProse's class of an image (0: watermark, 1: none, 2: other text) and its probability."""
SCORE_KEYS = (*SIMILARITY_KEYS, *UNSAFE_KEYS, *WATERMARK_KEYS, *WATERMARK_CLASS_KEYS)
"""Names of the scores that `prepare-data` can filter by."""
_LAION_SCORES = ("similarity", *UNSAFE_KEYS, *WATERMARK_KEYS)
UID_KEYS = ("uid", "hash", *_LAION_SCORES)
"""Names that `uid_key` uses."""
_EXACT_FLOATS = 1 << 53
"""From here on, several integers have the same float."""


class AmbiguousKey(ValueError):
    """A key that may stand for several records."""


def first_of(fields: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Value of the first key that exists and is not None."""
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


def caption_keys(chosen: str) -> tuple[str, ...]:
    """Return the keys of captions: the user's (see `captions.parse_roles`) or the usual ones."""
    return tuple(key for _, key in parse_roles(chosen)) if chosen else CAPTION_KEYS


def captions_of(fields: Mapping[str, Any], chosen: str) -> Any:
    """Return the captions of a record: one text, a list of texts, or None.

    Without a choice, the first of the usual keys with a value is used. If the user chose keys, each
    text of each key becomes a `RoleText`. Lists of lists are flattened, objects such as {raw: ...}
    are replaced by their text, and bytes are decoded.
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
    if isinstance(value, tuple):  # key and value of a map in a parquet file
        return _plain(value[1])
    if not isinstance(value, list):
        return value
    flat: list[Any] = []
    for item in map(_plain, value):
        if isinstance(item, list):
            flat += item
        else:
            flat.append(item)
    return flat


def id_of(fields: Mapping[str, Any]) -> str:
    """Return the id of a record, or "". The id 7.0, from a table with gaps, becomes 7."""
    value = first_of(fields, ID_KEYS)
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        value = int(value) if value.is_integer() else value
    return "" if value is None else str(value)


def embedded_image(data: str | bytes) -> bytes | None:
    """Decode an image in base64 or in a data URL. Return None for other data."""
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
    """List the fields of a record, for a message about a missing field."""
    names = ", ".join(map(str, fields))
    return f"{kind}: {names}" if names else f"no {kind}"


def pair_of(
    name: str, image: bytes | str | None, captions: Any, fields: Mapping[str, Any]
) -> RawPair:
    """Build a pair with URL, scores, uid and sha256 from `fields`."""
    url = first_of(fields, URL_KEYS)
    return RawPair(
        name, image, captions, url if isinstance(url, str) else "",
        _number(first_of(fields, SIMILARITY_KEYS)), note=note_of(fields),
        punsafe=_number(first_of(fields, UNSAFE_KEYS)), pwatermark=_watermark(fields),
        uid=uid_of(fields), sha256=_sha256_of(fields),
    )  # fmt: skip


def uid_of(fields: Mapping[str, Any]) -> str | None:
    """Return the unique id from the authors; "" if unusable, None if there is no such key."""
    key = uid_key(fields)
    return _usable(key, fields[key]) if key in fields else None


def uid_key(fields: Mapping[str, Any]) -> str:
    """Return the name of the unique id.

    LAION uses the integer `hash`. It is recognised by one of LAION's scores in the same record.
    """
    is_laion = "hash" in fields and any(name in fields for name in _LAION_SCORES)
    return "hash" if is_laion and "uid" not in fields else "uid"


def _sha256_of(fields: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of the image; "" if unusable, None if there is no such key."""
    value = fields.get("sha256")
    text = _usable("sha256", value) if isinstance(value, str | bytes) else ""
    return text if "sha256" in fields else None


def _usable(key: str, value: Any) -> str:
    """Return `key_text`, or "" if the value is ambiguous."""
    try:
        return key_text(key, value)
    except AmbiguousKey:
        return ""


def key_text(key: str, value: Any) -> str:
    """Convert a uid or another join key to text; None and NaN (a gap in a table) give "".

    Integers become text, and so do floats with an integer value: 7.0 becomes 7. A sha256 may be 32
    bytes, or the bytes of its hexadecimal form. Any other type counts as missing.

    Raises:
        AmbiguousKey: the value may stand for several keys.
    """
    if isinstance(value, float) and not math.isnan(value):
        if not value.is_integer():
            raise AmbiguousKey(f"{key} {value!r} has a fraction")
        if abs(value) >= _EXACT_FLOATS:
            raise AmbiguousKey(f"{key} {value!r} is a float of 2**53 or more, so not exact")
        value = int(value)
    if isinstance(value, bytes) and key == "sha256":
        is_hex = re.fullmatch(rb"[0-9a-fA-F]+", value) is not None
        if len(value) == 32 and not is_hex:
            return value.hex()
        if len(value) != 64 or not is_hex:
            what = "hexadecimal digits" if is_hex else "bytes"
            raise AmbiguousKey(f"sha256 is {len(value)} {what}, not 32 bytes or 64 digits")
        return value.decode().lower()
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if isinstance(value, str) or is_number else ""


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse the JSON file of an image; {} if it is not an object."""
    try:
        fields = untrusted.parse_json(data)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def as_text(data: bytes, encoding: str = "") -> str | bytes:
    """Decode text as UTF-8, or in `encoding` if there is no UTF-8 byte order mark.

    Without `encoding`, bytes that are not UTF-8 are returned unchanged and rejected later.

    Raises:
        UnicodeDecodeError: the bytes are not valid in `encoding`.
    """
    if encoding and not data.startswith(BOM_UTF8):
        return data.decode(encoding)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data


def _watermark(fields: Mapping[str, Any]) -> float | None:
    """Return the probability of a watermark.

    If only the probability of a class without a watermark is known, return its complement. The
    complement is an upper bound.
    """
    stated = _number(first_of(fields, WATERMARK_KEYS))
    if stated is not None:
        return stated
    kind, score = (_number(fields.get(key)) for key in WATERMARK_CLASS_KEYS)
    if kind is None or score is None:
        return None
    return score if kind == 0 else 1.0 - score


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number
