"""What a reader gives: pairs as they were found, in chunks that are converted one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from blip_scale.data.shards import Record
from blip_scale.storage.locations import is_folder, parent


class Reason(StrEnum):
    """Why something that was read is not written."""

    MISSING_IMAGE = "missing image"
    OUTSIDE = "outside the image folder"
    NOT_REGULAR = "no regular file"
    UNDECODABLE = "undecodable"
    TOO_SMALL = "too small"
    EXTREME_ASPECT = "extreme aspect"
    TOO_MANY_PIXELS = "too many pixels"
    MISSING_CAPTION = "missing caption"
    CAPTION_NO_TEXT = "caption is no text"
    EMPTY_CAPTION = "empty caption"
    DUPLICATE_ID = "duplicate id"
    MISSING_KEY = "missing key"
    WEB_UNMATCHED = "web caption doesn't match"
    SYNTHETIC_UNMATCHED = "synthetic caption doesn't match"
    BAD_ANNOTATION = "bad annotation"
    DAMAGED_INPUT = "damaged input"


@dataclass(frozen=True, slots=True)
class RawPair:
    """One image with its text as the source has it; nothing is checked yet."""

    id: str
    image: bytes | str | None
    """The encoded file, or where it lies (a path or URL); None: the source has no image."""
    captions: Any
    """One text or a list of them; None: the source has no text."""
    url: str = ""
    similarity: float | None = None
    stored_bytes: int = 0
    """What it takes in the input, where that is much more than its image."""
    annotations: list[dict[str, Any]] | None = None
    """What the task knows of each of the captions, one each."""
    second_image: bytes | str | None = None
    """Where the captions speak of two images."""
    is_question: bool = False
    """Questions are cleaned in another way than captions."""
    note: str = ""
    """What the source has in place of a caption or an image, for the reject: its keys or columns.
    """
    from_folder: bool = False
    """The image was seen in a folder, whose links are followed. Otherwise a list names it: then it
    must lie below the folder of images (see `Source.image_root`)."""


@dataclass(frozen=True)
class Reject:
    """What was read and not written, and why."""

    id: str
    """Of the pair, or the place in the input where there is no pair to read."""
    reason: Reason
    detail: str = ""
    caption: int | None = None
    """Only this caption of the pair is rejected, by its number; None: the whole pair."""
    captions: int = 0
    """Captions that are rejected with it, where the source gave no pair."""


@dataclass(frozen=True)
class Unused:
    """Something in the input that is no pair: counted in the summary."""

    kind: str
    """What it is, in the plural: "files .cls"."""
    count: int = 1


@dataclass(frozen=True)
class Screened:
    """What became of a pair that its reader screened itself."""

    id: str
    record: Record | None
    """None: the whole pair is rejected."""
    rejects: list[Reject]
    captions: int
    """So many were read, or made."""
    tallies: dict[str, int] = field(default_factory=dict)
    """Numbers that are added up over the set, for its summary."""


Found = RawPair | Reject | Screened | Unused


@dataclass(frozen=True)
class Chunk:
    """A piece of the input that one process converts to shards of its own.

    The same input must give the same chunks in the same order: their numbers name the shards.
    """

    name: str
    read: Callable[[], Iterable[Found]]
    """Runs in another process, so it must be picklable (functools.partial of a function)."""
    fingerprint: str
    """Changes when the input changes (see `fingerprints`); "" where `listed` tells it."""
    pairs: int | None = None
    """How many there are, where that is known before reading."""
    input_bytes: int = 0
    """Size of a file that is read as a whole, 0 for a list of images."""
    listed: Sequence[Found] = ()
    """Pairs out of a list, whose content and images are the input."""


@dataclass(frozen=True)
class Source:
    """What the user points at, and how it is to be read."""

    location: str
    """A folder or file; a path or a URL (see `storage.objects`)."""
    images: str = ""
    """Folder that the image paths of annotations start from; "": where the annotations lie."""
    strip_prefix: str = ""
    """Removed from the image paths of annotations first: lists hold their makers' absolute paths.
    """
    caption_key: str = ""
    """Key or column with the caption, where it is none of the usual ones."""
    image_key: str = ""
    """Column with the image, where it is none of the usual ones."""
    pairs_per_chunk: int = 4000
    """Where the input is a list of images; tars and parquet files are a chunk each."""

    def image_root(self) -> str:
        """The folder that images must lie below which a list names.

        Raises:
            FileNotFoundError: there is nothing at the location.
        """
        location = self.location
        return self.images or (location if is_folder(location) else parent(location))


Reader = Callable[..., Iterable[Chunk]]
"""reader(source, **options): the options that only this reader has are keywords, text."""
