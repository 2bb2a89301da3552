"""Screen pairs: check the image and the captions, then return a record to write or a reject."""

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
"""Errors of a single file, not of the disk: the file is missing, forbidden or not a file."""
_ORIENTATION = 0x0112  # EXIF tag; the value 1 means upright
PIXEL_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Maximum number of pixels that Pillow accepts (178,956,970), here and in training."""


@dataclass(frozen=True)
class Rules:
    """Rules for accepting pairs, and settings for writing them."""

    source: str
    """Name of the set in every record."""
    max_words: int = 30
    """Maximum number of words in a cleaned caption. Longer captions are cut, as in BLIP's code."""
    min_side: int = 32
    """Minimum length of the shorter side, in pixels."""
    max_aspect: float = 10.0
    """Maximum ratio of the longer to the shorter side."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels. Larger images are rejected before they are decoded."""
    max_side: int | None = None
    """Maximum length of the shorter side, in pixels. Larger images are scaled down and re-encoded.
    None disables scaling."""
    jpeg_quality: int = 95
    """JPEG quality of images that are scaled down or rotated upright."""
    holdout: int | float | None = None
    """Number (int) or share (float) of pairs to hold out; None to hold out no pairs."""
    raw_captions: bool = False
    """Keep captions whole, with case and punctuation. Training cleans and cuts them."""
    add_sha256: bool = False
    """Compute the SHA-256 of the image in the source, if the source does not provide it."""
    images_below: str | None = None
    """Folder below which images named in a list must lie; None allows any place, also the web."""
    min_similarity: float | None = None
    """Minimum similarity of image and text; None for no limit."""
    max_punsafe: float | None = None
    """Maximum probability that the image is unsafe; None for no limit."""
    max_pwatermark: float | None = None
    """Maximum probability of a watermark; None for no limit."""
    keep_unscored: bool = False
    """Accept pairs that lack a score for which a limit is set."""
    in_place: bool = False
    """Write the position of each image in its tar, and read only the image's header."""

    @property
    def word_limit(self) -> int:
        """Maximum number of words in a caption; no limit if captions are kept whole."""
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
    """Encoded image file."""
    width: int
    height: int
    reencoded: bool
    """Whether `data` differs from the source because the image was rotated or scaled."""


def screen(pair: RawPair, rules: Rules) -> tuple[Record | None, list[Reject], bool]:
    """Check a pair. A fault in the pair rejects only this pair.

    Returns:
        The record to write (None if the pair is rejected), the rejects of the pair or of some of
        its captions, and whether the image was re-encoded.

    Raises:
        OSError: the disk or the network failed, so the pair is not at fault.
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
    except Exception as error:  # damaged input can raise any type of exception
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
    """Reject a pair by its scores, before its image is opened."""
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
    """Return the annotations of the captions that were not rejected."""
    if pair.annotations is None:
        return None
    dropped = {reject.caption for reject in rejects}
    return [entry for number, entry in enumerate(pair.annotations) if number not in dropped]


def _sha256(pair: RawPair, image: bytes, rules: Rules) -> str | None:
    if not rules.add_sha256:
        return pair.sha256
    return pair.sha256 or hashlib.sha256(image).hexdigest()


def _captions(pair: RawPair, rules: Rules) -> tuple[list[str], list[str] | None, list[Reject]]:
    """Return the captions to write, their roles (None without roles), and the rejects.

    The pair is rejected if no caption is left.
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
    """Return a caption after `plain`, or the reason and detail of its reject."""
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
    """Whether a text can be encoded. Invalid UTF-8 was decoded to halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_bytes(image: bytes | str | None, root: str | None, note: str = "") -> bytes:
    """Return the encoded image. Its file must lie below the folder `root`, unless that is None."""
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
        if is_web(image):  # a dead web host rejects one image; a failing bucket stops the run
            raise _Refused(Reason.MISSING_IMAGE, f"{image}: {type(error).__name__}") from error
        if isinstance(error, RefusedError | UnusableRemote):
            raise
        if isinstance(error, FileNotFoundError | ValueError):
            raise _Refused(Reason.MISSING_IMAGE, image) from error
        raise


def check_image(data: bytes, rules: Rules) -> Picture:
    """Decode and check an image. Raise `_Refused` with the reason if it is rejected.

    The bytes are kept, with two exceptions. An image whose EXIF orientation is not upright is
    rotated or mirrored, because training ignores EXIF. An image above `rules.max_side` is scaled
    down.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about size and unusual metadata
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
                    to_rgb(image)  # check that the conversion in training works
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
    except Exception as error:  # decoders raise different types of exceptions
        raise _Refused(Reason.UNDECODABLE, describe(error)) from error


def turned_upright(data: bytes) -> bytes:
    """Apply the EXIF orientation to an image, like a conversion with the default rules."""
    with open_image(data) as image:
        return _encode_anew(image, Rules("")).data


def _check_size(size: tuple[int, int], rules: Rules) -> None:
    """Check the size in the header before decoding, because a small file may use all memory."""
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
