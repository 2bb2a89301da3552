"""Screen a pair: check its image and captions, and make the record to write or a reject."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from blip_scale.config.recipe import MAX_PIXELS
from blip_scale.data.captions import (
    DEFAULT_ROLE,
    Clean,
    RoleText,
    clean_question,
    clean_to_a_sentence,
    plain,
)
from blip_scale.data.conversion.pairs import LARGEST_FILE_BYTES, RawPair, Reason, Reject
from blip_scale.data.pixels.decoding import describe, to_rgb
from blip_scale.data.pixels.formats import UNKNOWN_FORMAT, open_image
from blip_scale.data.reading.stream_store import CorruptSample
from blip_scale.data.shards import Record
from blip_scale.storage.locations import FileTooLarge, NotRegularFile, is_web, read_file
from blip_scale.storage.objects import RefusedError, RemoteError, UnusableRemote
from blip_scale.storage.untrusted import RefusedPath, below

_OF_ONE_FILE = (
    errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.ENXIO, errno.EPERM,
)  # fmt: skip
"""Errors about one file, not about the disk: it is missing, forbidden or not a file."""
_ORIENTATION = 0x0112  # the EXIF tag; 1: upright
PIXEL_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Largest image that Pillow opens (178,956,970 pixels), here and in training."""


@dataclass(frozen=True)
class Rules:
    """Which pairs are accepted, and how they are written."""

    source: str
    """Name of the set in every record."""
    max_words: int = 30
    """Most words of a cleaned caption; longer captions are cut, as published."""
    min_side: int = 32
    """Smallest shorter side, in pixels."""
    max_aspect: float = 10.0
    """Largest ratio of the longer to the shorter side."""
    max_pixels: int = MAX_PIXELS
    """Most pixels; larger images are rejected before they are decoded."""
    max_side: int | None = None
    """Largest shorter side, in pixels; larger images are scaled down. None keeps all bytes."""
    jpeg_quality: int = 95
    """JPEG quality of images that are scaled down or turned upright."""
    holdout: int | float | None = None
    """Pairs to hold out: an int is their number, a float their share; None: none."""
    raw_captions: bool = False
    """Keep captions whole, with case and punctuation; training cleans and cuts them."""
    add_sha256: bool = False
    """Compute the SHA-256 of images, as the source holds them, where it gives none."""
    images_below: str | None = None
    """Folder that must hold the images that a list names; None: anywhere, also on the web."""
    min_similarity: float | None = None
    """Smallest similarity of image and text; None: any."""
    max_punsafe: float | None = None
    """Largest probability that the image is unsafe; None: any."""
    max_pwatermark: float | None = None
    """Largest probability of a watermark; None: any."""
    keep_unscored: bool = False
    """Accept pairs without the score that a limit is set for."""
    in_place: bool = False
    """Write where images lie in their tar, and look only at their headers."""

    @property
    def word_limit(self) -> int:
        """Most words of a caption; without a limit where captions are kept whole."""
        return sys.maxsize if self.raw_captions else self.max_words


class _Refused(Exception):
    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Picture:
    """An image that was decoded without an error."""

    data: bytes
    """Encoded file."""
    width: int
    height: int
    reencoded: bool
    """Whether `data` differs from the source, because the image was turned or scaled."""


def screen(pair: RawPair, rules: Rules) -> tuple[Record | None, list[Reject], bool]:
    """Check a pair. Whatever is wrong with it rejects this pair alone.

    Returns:
        The record to write (None: the pair is rejected), the rejects of the pair or of some of its
        captions, and whether its image was encoded again.

    Raises:
        OSError: the disk or the network failed, which is no property of the pair.
    """
    try:
        return _screen(pair, rules)
    except _Refused as refused:
        return None, [Reject(pair.id, refused.reason, refused.detail)], False
    except (MemoryError, UnusableRemote):
        raise
    except OSError as error:
        if error.errno not in _OF_ONE_FILE or isinstance(error, RemoteError):
            raise
        detail = f"{error.strerror}: {error.filename}"
        return None, [Reject(pair.id, Reason.MISSING_IMAGE, detail)], False
    except Exception as error:  # each kind of damage is an exception of its own
        return None, [Reject(pair.id, Reason.DAMAGED_INPUT, describe(error))], False


def _screen(pair: RawPair, rules: Rules) -> tuple[Record | None, list[Reject], bool]:
    for name, text in (
        ("id", pair.id), ("URL", pair.url), ("uid", pair.uid or ""), ("sha256", pair.sha256 or ""),
    ):  # fmt: skip
        if not is_unicode(text):
            raise _Refused(Reason.DAMAGED_INPUT, f"its {name} is no UTF-8")
    if not is_unicode(json.dumps(pair.annotations, ensure_ascii=False)):
        raise _Refused(Reason.BAD_ANNOTATION, "half a surrogate pair")
    _check_scores(pair, rules)
    captions, roles, rejects = _captions(pair, rules)
    root = None if pair.from_folder else rules.images_below
    image = _image_bytes(pair.image, root, pair.note)
    picture = check_image(image, rules)
    second = None
    if pair.second_image is not None:
        second = check_image(_image_bytes(pair.second_image, root), rules)
    similarity = math.nan if pair.similarity is None else pair.similarity
    record = Record(
        pair.id, picture.data, captions, rules.source,
        picture.width, picture.height, pair.url, similarity,
        _annotations(pair, rejects), second.data if second else None,
        roles, pair.uid, _sha256(pair, image, rules),
    )  # fmt: skip
    if rules.in_place:
        if pair.offset is None:
            raise _Refused(Reason.NOT_IN_PLACE, "a link, a sparse file or a compressed tar")
        place = (pair.offset, len(picture.data), picture.reencoded)
        return replace(record, image=b"", image_place=place), rejects, False
    return record, rejects, picture.reencoded or (second is not None and second.reencoded)


def _check_scores(pair: RawPair, rules: Rules) -> None:
    """Refuse a pair by its scores, before its image is opened."""
    for name, value, smallest, largest, reason in (
        ("similarity", pair.similarity, rules.min_similarity, None, Reason.LOW_SIMILARITY),
        ("punsafe", pair.punsafe, None, rules.max_punsafe, Reason.UNSAFE),
        ("pwatermark", pair.pwatermark, None, rules.max_pwatermark, Reason.WATERMARK),
    ):
        if smallest is None and largest is None:
            continue
        if value is None:
            if not rules.keep_unscored:
                raise _Refused(Reason.MISSING_SCORE, f"no {name}; {pair.note}")
        elif (smallest is not None and value < smallest) or (
            largest is not None and value > largest
        ):
            raise _Refused(reason, f"{value:.4g}")


def _annotations(pair: RawPair, rejects: list[Reject]) -> list[dict[str, Any]] | None:
    """Annotations of the captions that are kept."""
    if pair.annotations is None:
        return None
    dropped = {reject.caption for reject in rejects}
    return [entry for number, entry in enumerate(pair.annotations) if number not in dropped]


def _sha256(pair: RawPair, image: bytes, rules: Rules) -> str | None:
    if not rules.add_sha256:
        return pair.sha256
    return pair.sha256 or hashlib.sha256(image).hexdigest()


def _captions(pair: RawPair, rules: Rules) -> tuple[list[str], list[str] | None, list[Reject]]:
    """The captions to write, their roles if the source has any, and rejects of the others.

    The pair is refused if no caption is left.
    """
    clean: Clean = clean_question if pair.is_question else clean_to_a_sentence
    if rules.raw_captions:
        clean = _plain
    captions = pair.captions if isinstance(pair.captions, list) else [pair.captions]
    cleaned: list[str] = []
    roles: list[str] = []
    rejects: list[Reject] = []
    for number, caption in enumerate(captions):
        role, text = caption if isinstance(caption, RoleText) else (DEFAULT_ROLE, caption)
        try:
            cleaned.append(_clean(text, rules.max_words, clean))
            roles.append(role)
        except _Refused as refused:
            rejects.append(Reject(pair.id, refused.reason, refused.detail, number))
    if cleaned:
        has_roles = any(isinstance(caption, RoleText) for caption in captions)
        return cleaned, roles if has_roles else None, rejects
    first = rejects[0] if rejects else Reject(pair.id, Reason.MISSING_CAPTION)
    raise _Refused(first.reason, first.detail or pair.note)


def _plain(caption: str, max_words: int) -> str:
    return plain(caption)


def kept_whole(caption: object) -> str | tuple[Reason, str]:
    """A caption as `plain` leaves it, or reason and detail of its reject."""
    try:
        return _clean(caption, 0, _plain)
    except _Refused as refused:
        return refused.reason, refused.detail


def _clean(caption: object, max_words: int, clean: Clean) -> str:
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        raise _Refused(Reason.MISSING_CAPTION)
    if isinstance(caption, bytes):
        raise _Refused(
            Reason.CAPTION_NO_TEXT,
            "not UTF-8: convert it, as with iconv, or give --encoding (folder)",
        )
    if not isinstance(caption, str):
        raise _Refused(Reason.CAPTION_NO_TEXT, type(caption).__name__)
    if not is_unicode(caption):
        raise _Refused(Reason.CAPTION_NO_TEXT, "half a surrogate pair, or no UTF-8")
    cleaned = clean(caption, max_words)
    if not cleaned.strip():
        raise _Refused(Reason.EMPTY_CAPTION)
    return cleaned


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded; invalid UTF-8 was read as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_bytes(image: bytes | str | None, root: str | None, note: str = "") -> bytes:
    """The encoded image; `root` is the folder that must hold its file, None: anywhere."""
    if image is None:
        raise _Refused(Reason.MISSING_IMAGE, note)
    if isinstance(image, bytes):
        return image
    try:
        return read_file(image if root is None else below(root, image), LARGEST_FILE_BYTES)
    except RefusedPath as error:
        raise _Refused(Reason.OUTSIDE, f"{error} (see --allow-outside)") from error
    except NotRegularFile as error:
        raise _Refused(Reason.NOT_REGULAR, image) from error
    except FileTooLarge as error:
        raise _Refused(Reason.FILE_TOO_LARGE, f"{image}: {error}") from error
    except (OSError, ValueError) as error:
        if is_web(image):  # hosts die; a bucket must not
            raise _Refused(Reason.MISSING_IMAGE, f"{image}: {type(error).__name__}") from error
        if isinstance(error, RefusedError | UnusableRemote):
            raise
        if isinstance(error, FileNotFoundError | ValueError):
            raise _Refused(Reason.MISSING_IMAGE, image) from error
        raise


def check_image(data: bytes, rules: Rules) -> Picture:
    """Decode a whole image; an exception gives the reason why it is refused.

    The bytes are kept, with two exceptions. An image that EXIF says lies on its side is turned, as
    training does not look at EXIF. An image above `rules.max_side` is scaled down.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of size and odd metadata
            with open_image(data) as image:
                _check_size(image.size, rules)
                if not rules.in_place:
                    image.load()
                orientation = image.getexif().get(_ORIENTATION, 1)
                turned = orientation in range(2, 9)
                if rules.in_place:
                    upright = image.size[::-1] if orientation in range(5, 9) else image.size
                    return Picture(data, *upright, reencoded=turned)
                large = rules.max_side is not None and min(image.size) > rules.max_side
                if turned or large:
                    return _encode_anew(image, rules)
                if image.mode != "RGB":
                    to_rgb(image)  # as training will
                return Picture(data, *image.size, reencoded=False)
    except (_Refused, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _Refused(Reason.TOO_MANY_PIXELS, f"over {PIXEL_LIMIT}") from error
    except CorruptSample as error:
        raise _Refused(Reason.UNDECODABLE, str(error)) from error
    except UnidentifiedImageError as error:
        detail = UNKNOWN_FORMAT if data else "no bytes"
        raise _Refused(Reason.UNDECODABLE, detail) from error
    except Exception as error:  # each format's decoder has its own ways to fail
        raise _Refused(Reason.UNDECODABLE, describe(error)) from error


def turned_upright(data: bytes) -> bytes:
    """An image that EXIF says is turned, as a conversion with the usual rules writes it."""
    with open_image(data) as image:
        return _encode_anew(image, Rules("")).data


def _check_size(size: tuple[int, int], rules: Rules) -> None:
    """Check the size in the header, before a small file can claim all memory."""
    detail = f"{size[0]}x{size[1]}"
    if size[0] * size[1] > rules.max_pixels:
        raise _Refused(Reason.TOO_MANY_PIXELS, detail)
    if min(size) < rules.min_side:
        raise _Refused(Reason.TOO_SMALL, detail)
    if max(size) > rules.max_aspect * min(size):
        raise _Refused(Reason.EXTREME_ASPECT, detail)


def _encode_anew(image: Image.Image, rules: Rules) -> Picture:
    upright = to_rgb(ImageOps.exif_transpose(image))
    scale = 1.0 if rules.max_side is None else min(1.0, rules.max_side / min(upright.size))
    if scale < 1.0:
        size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
        upright = upright.resize(size, Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    upright.save(encoded, "JPEG", quality=rules.jpeg_quality)
    return Picture(encoded.getvalue(), *upright.size, reencoded=True)
