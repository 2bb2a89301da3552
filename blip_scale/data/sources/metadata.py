"""Names that data sets use: keys of JSON files, columns of tables, endings of files."""

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
"""Names of captions, of which the first with a value is used. img2dataset calls `caption` what the
user chose by --caption_col."""
_DATA_URL = re.compile(rb"data:image/[\w.+-]+;base64,")
_BASE64_STARTS = (b"/9j/", b"iVBORw0KGgo", b"UklGR", b"R0lGOD", b"Qk0", b"SUkqA", b"TU0AK")
"""First characters of JPEG, PNG, WebP, GIF, BMP and TIFF files in base64."""
_SHORTEST_BASE64 = 100  # characters; a path is shorter, and no image is
_INNER_KEYS = ("raw", "caption", "text", "sentence")
"""Keys of the text in a caption that is an object."""
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
"""Names that `uid_key` looks at."""
_EXACT_FLOATS = 1 << 53
"""Integers from here on share their floats with others."""


class AmbiguousKey(ValueError):
    """A key that may stand for several records."""


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
    """Build a pair with url and scores from `fields`."""
    url = first_of(fields, URL_KEYS)
    return RawPair(
        name, image, captions, url if isinstance(url, str) else "",
        _number(first_of(fields, SIMILARITY_KEYS)), note=note_of(fields),
        punsafe=_number(first_of(fields, UNSAFE_KEYS)), pwatermark=_watermark(fields),
        uid=uid_of(fields), sha256=_sha256_of(fields),
    )  # fmt: skip


def uid_of(fields: Mapping[str, Any]) -> str | None:
    """Unique id by the maker of the set; "" without a usable value, None without such a key."""
    key = uid_key(fields)
    return _usable(key, fields[key]) if key in fields else None


def uid_key(fields: Mapping[str, Any]) -> str:
    """Name of the unique id. LAION's is its `hash`, an integer, beside one of LAION's scores."""
    is_laion = "hash" in fields and any(name in fields for name in _LAION_SCORES)
    return "hash" if is_laion and "uid" not in fields else "uid"


def _sha256_of(fields: Mapping[str, Any]) -> str | None:
    """Hash of the image; "" if it is something else, None if there is no such key."""
    value = fields.get("sha256")
    text = _usable("sha256", value) if isinstance(value, str | bytes) else ""
    return text if "sha256" in fields else None


def _usable(key: str, value: Any) -> str:
    """`key_text`, or "" for what is ambiguous."""
    try:
        return key_text(key, value)
    except AmbiguousKey:
        return ""


def key_text(key: str, value: Any) -> str:
    """Text of a uid or another key that records are joined by; "" for None and for a gap (NaN).

    Integers become text, and so do floats that are one: 7.0 is 7. A sha256 may be its 32 bytes,
    or the bytes of its hexadecimal form. Whatever else is no text counts as missing.

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
    """Decode UTF-8, or another encoding where no byte order mark says UTF-8. Bytes that are not
    UTF-8 stay bytes, which are rejected later.

    Raises:
        UnicodeDecodeError: the bytes are not of the encoding.
    """
    if encoding and not data.startswith(BOM_UTF8):
        return data.decode(encoding)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data


def _watermark(fields: Mapping[str, Any]) -> float | None:
    """Probability of a watermark. From a class without one it is at most what the class leaves."""
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
