"""What a reader gives: pairs as they were found, in chunks that are converted one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
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


@dataclass(frozen=True)
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


Found = RawPair | Reject | Screened


@dataclass(frozen=True)
class Chunk:
    """A piece of the input that one process converts to shards of its own.

    The same input must give the same chunks in the same order: their numbers name the shards.
    """

    name: str
    read: Callable[[], Iterable[Found]]
    """Runs in another process, so it must be picklable (functools.partial of a function)."""
    fingerprint: str
    """Changes when the input changes."""
    pairs: int | None = None
    """How many there are, where that is known before reading."""
    input_bytes: int = 0
    """Size of a file that is read as a whole, 0 for a list of images."""


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


def in_chunks(found: list[Found], size: int) -> Iterator[Chunk]:
    """Cut a list into chunks of `size`."""
    for start in range(0, len(found), size):
        part = found[start : start + size]
        yield Chunk(
            name=f"{start} to {start + len(part) - 1}",
            read=partial(iter, part),
            fingerprint=f"{len(part)}: {part[0].id} to {part[-1].id}",
            pairs=len(part),
        )


def group_by_image(found: Iterable[Found]) -> list[Found]:
    """Pairs of the same id become one with all their captions and annotations, in the order of
    first sight."""
    grouped: dict[str, RawPair] = {}
    captions: dict[str, list[Any]] = {}
    annotations: dict[str, list[dict[str, Any]]] = {}
    rejects: list[Found] = []
    for one in found:
        if not isinstance(one, RawPair):
            rejects.append(one)
            continue
        grouped.setdefault(one.id, one)
        texts = one.captions if isinstance(one.captions, list) else [one.captions]
        captions.setdefault(one.id, []).extend(texts)
        annotations.setdefault(one.id, []).extend(one.annotations or [])
    whole = (
        replace(pair, captions=captions[pair.id], annotations=annotations[pair.id] or None)
        for pair in grouped.values()
    )
    return [*whole, *rejects]
