"""Items that readers yield: unchecked pairs, rejects and unused files, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from blip_scale.data.shards import Record
from blip_scale.storage.locations import is_folder, parent

LARGEST_FILE_BYTES = 256 << 20
"""Largest image or text that is read. A worker holds it in memory, and a compressed tar can claim
any size."""


class Reason(StrEnum):
    """Why an input item is not written."""

    MISSING_IMAGE = "missing image"
    OUTSIDE = "outside the image folder"
    NOT_REGULAR = "no regular file"
    FILE_TOO_LARGE = "file too large"
    UNDECODABLE = "undecodable"
    TOO_SMALL = "too small"
    EXTREME_ASPECT = "extreme aspect"
    TOO_MANY_PIXELS = "too many pixels"
    MISSING_CAPTION = "missing caption"
    CAPTION_NO_TEXT = "caption is no text"
    EMPTY_CAPTION = "empty caption"
    DUPLICATE_ID = "duplicate id"
    MISSING_KEY = "missing key"
    LOW_SIMILARITY = "similarity too low"
    UNSAFE = "punsafe too high"
    WATERMARK = "pwatermark too high"
    MISSING_SCORE = "missing score"
    NOT_IN_PLACE = "can't be read in place"
    WEB_UNMATCHED = "web caption doesn't match"
    SYNTHETIC_UNMATCHED = "synthetic caption doesn't match"
    NO_SUCH_IMAGE = "no such image"
    DUPLICATE_KEY = "duplicate key"
    NO_ANSWER = "captioner gives no caption"
    BAD_ANNOTATION = "bad annotation"
    DAMAGED_INPUT = "damaged input"


@dataclass(frozen=True, slots=True)
class RawPair:
    """One image with its text as the source has it, unchecked."""

    id: str
    image: bytes | str | None
    """The encoded file, or its path or URL; None: the source has no image."""
    captions: Any
    """One text or a list of them, each perhaps a `captions.RoleText`; None: the source has no
    text."""
    url: str = ""
    similarity: float | None = None
    stored_bytes: int = 0
    """Size in the input, where that is much more than the size of the image."""
    annotations: list[dict[str, Any]] | None = None
    """Facts of the task, one entry a caption."""
    second_image: bytes | str | None = None
    """The other image, where captions are about two."""
    is_question: bool = False
    """Whether the captions are questions, which are cleaned in another way."""
    uid: str | None = None
    """Unique id that the maker of the set gave the pair; None: the source has no such key."""
    sha256: str | None = None
    """SHA-256 of the image according to the source; None: the source has no such key."""
    note: str = ""
    """Keys or columns that the source has in place of a caption or an image, for the reject."""
    from_folder: bool = False
    """Whether the image was listed from a folder, whose links are followed. Otherwise a list names
    it, and it must lie below the folder of images (see `Source.image_root`)."""
    punsafe: float | None = None
    """Probability that the image is unsafe; None where unknown."""
    pwatermark: float | None = None
    """Probability of a watermark; None where unknown."""
    offset: int | None = None
    """First byte of the image in an uncompressed tar; None for images that lie elsewhere."""


@dataclass(frozen=True)
class Reject:
    """An input item that is not written."""

    id: str
    """Id of the pair, or the place in the input where no pair can be read."""
    reason: Reason
    detail: str = ""
    caption: int | None = None
    """Number of the rejected caption; None: the whole pair is rejected."""
    captions: int = 0
    """Number of captions that are rejected with it, where the source gave no pair."""


@dataclass(frozen=True)
class Unused:
    """An input item that is no pair; the summary counts it."""

    kind: str
    """Kind of the item, in the plural: "files .cls"."""
    count: int = 1


@dataclass(frozen=True)
class Screened:
    """A pair that its reader screened itself."""

    id: str
    record: Record | None
    """The record to write; None: the whole pair is rejected."""
    rejects: list[Reject]
    captions: int
    """Number of captions that were read or made."""
    tallies: dict[str, int] = field(default_factory=dict)
    """Numbers that are added up over the set, for its summary."""


Found = RawPair | Reject | Screened | Unused


class Place(NamedTuple):
    """Where an item of a list begins."""

    file: int
    """Number of the file, where a list has several."""
    offset: int
    """First byte."""
    number: int
    """Number of the line in a table, of the item in JSON or in its batch of a spool."""


START = Place(0, 0, 0)

ReadList = Callable[[Place], Iterator[tuple[Place, Found]]]
"""read(start): the items of a list from a place on. It runs in other processes, so it must be
picklable."""


@dataclass(frozen=True)
class Chunk:
    """A piece of the input that one process converts to shards of its own.

    The same input must give the same chunks in the same order: their numbers name the shards.
    """

    name: str
    read: Callable[[], Iterable[Found]]
    """Yields the items. It runs in another process, so it must be picklable (functools.partial of
    a function)."""
    fingerprint: str
    """Text that changes when the input changes (see `fingerprints`); "" for pairs out of a list:
    it is made from what `read` yields, and from the images that these pairs name."""
    pairs: int | None = None
    """Number of pairs, where it is known before reading."""
    input_bytes: int = 0
    """Size of a file that is read as a whole; 0 for a list of images."""


@dataclass(frozen=True)
class Source:
    """The user's input, and how to read it."""

    location: str
    """Folder or file; a path or a URL (see `storage.objects`)."""
    images: str = ""
    """Folder that the image paths of annotations start from; "": where the annotations lie."""
    strip_prefix: str = ""
    """Prefix to remove from the image paths of annotations: lists hold their makers' absolute
    paths."""
    caption_key: str = ""
    """Key or column with the caption, where it has an unusual name."""
    image_key: str = ""
    """Column with the image, where it has an unusual name."""
    pairs_per_chunk: int = 4000
    """Pairs a chunk, of lists and folders; tars and parquet files are a chunk each."""
    scratch: str = ""
    """Folder for temporary files; "": the system's."""

    def image_root(self) -> str:
        """Folder that must hold the images that a list names.

        Raises:
            FileNotFoundError: there is nothing at the location.
        """
        location = self.location
        return self.images or (location if is_folder(location) else parent(location))


Reader = Callable[..., Iterable[Chunk]]
"""reader(source, **options): options that only this reader has are keywords with text."""
