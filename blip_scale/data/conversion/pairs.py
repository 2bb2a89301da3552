"""Types that readers yield: chunks of unchecked pairs, rejects and unused files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from blip_scale.data.shards import Record
from blip_scale.storage.locations import is_folder, parent

LARGEST_FILE_BYTES = 256 << 20
"""Maximum size of an image or text file. A worker reads the whole file into memory, and a
compressed tar may declare any size."""


class Reason(StrEnum):
    """Reason why an input item is not written."""

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
    """An image and its text as the source holds them, unchecked."""

    id: str
    image: bytes | str | None
    """Encoded file, or its path or URL; None if the source has no image."""
    captions: Any
    """A text or a list of texts, each a plain text or a `captions.RoleText`; None if the source
    has no text."""
    url: str = ""
    similarity: float | None = None
    stored_bytes: int = 0
    """Size in the input, if it is much larger than the image; otherwise 0."""
    annotations: list[dict[str, Any]] | None = None
    """Task-specific fields, one entry per caption."""
    second_image: bytes | str | None = None
    """Second image, if the captions describe two images."""
    is_question: bool = False
    """Whether the captions are questions, which have their own cleaning rules."""
    uid: str | None = None
    """Unique id from the authors of the data set; None if the source has no such key."""
    sha256: str | None = None
    """SHA-256 of the image according to the source; None if the source has no such key."""
    note: str = ""
    """Keys or columns present instead of a caption or an image, for the message of a reject."""
    from_folder: bool = False
    """Whether the image comes from listing a folder, in which links are followed. If not, a list
    names it, and it must lie below the folder of images (see `Source.image_root`)."""
    punsafe: float | None = None
    """Probability that the image is unsafe; None if unknown."""
    pwatermark: float | None = None
    """Probability of a watermark; None if unknown."""
    offset: int | None = None
    """First byte of the image in an uncompressed tar; None for any other image."""


@dataclass(frozen=True)
class Reject:
    """An input item that is not written."""

    id: str
    """Id of the pair, or the place in the input if no pair could be read there."""
    reason: Reason
    detail: str = ""
    caption: int | None = None
    """Index of the rejected caption; None if the whole pair is rejected."""
    captions: int = 0
    """Number of captions rejected with the item, if the source gave no pair."""


@dataclass(frozen=True)
class Unused:
    """An input item that is not a pair. The summary counts it."""

    kind: str
    """Kind of the item, in the plural: "files .cls"."""
    count: int = 1


@dataclass(frozen=True)
class Screened:
    """A pair that its reader has already screened."""

    id: str
    record: Record | None
    """Record to write; None if the whole pair is rejected."""
    rejects: list[Reject]
    captions: int
    """Number of captions that were read or made."""
    tallies: dict[str, int] = field(default_factory=dict)
    """Counts that are summed over the set for its summary."""


Found = RawPair | Reject | Screened | Unused


class Place(NamedTuple):
    """Position at which an item of a list begins."""

    file: int
    """Index of the file, if the list has several files."""
    offset: int
    """First byte."""
    number: int
    """Line number in a table, index of the item in JSON, or index in a batch of a spool."""


START = Place(0, 0, 0)

ReadList = Callable[[Place], Iterator[tuple[Place, Found]]]
"""read(start): yield the items of a list, beginning at a place. It runs in other processes, so it
must be picklable."""


@dataclass(frozen=True)
class Chunk:
    """A piece of the input that one process converts to separate shards.

    The same input must give the same chunks in the same order, because the shards are named after
    the chunk numbers.
    """

    name: str
    read: Callable[[], Iterable[Found]]
    """Function that yields the items. It runs in another process, so it must be picklable, such as
    a functools.partial of a function."""
    fingerprint: str
    """Text that changes when the input changes (see `fingerprints`); "" for pairs from a list. For
    these, it is computed from the pairs that `read` yields and from the images that they name."""
    pairs: int | None = None
    """Number of pairs; None if unknown before reading."""
    input_bytes: int = 0
    """Size of the input file if it is read as a whole; 0 for a list of images."""


@dataclass(frozen=True)
class Source:
    """The user's input, and how to read it."""

    location: str
    """Path or URL of a folder or file (see `storage.objects`)."""
    images: str = ""
    """Base folder of the image paths in annotations; "" for the folder of the annotations."""
    strip_prefix: str = ""
    """Prefix to remove from the image paths in annotations. Some lists hold absolute paths of
    their authors' machines."""
    caption_key: str = ""
    """Key or column with the caption, if it is not one of the usual names."""
    image_key: str = ""
    """Column with the image, if it is not one of the usual names."""
    pairs_per_chunk: int = 4000
    """Pairs per chunk for lists and folders. Each tar or parquet file is one chunk."""
    scratch: str = ""
    """Folder for temporary files; "" for the system's."""

    def image_root(self) -> str:
        """Return the folder below which the images named in a list must lie.

        Raises:
            FileNotFoundError: the location does not exist.
        """
        location = self.location
        return self.images or (location if is_folder(location) else parent(location))


Reader = Callable[..., Iterable[Chunk]]
"""reader(source, **options): options specific to a reader are keyword arguments of type str."""
