"""On-disk format of image-text pairs: a folder of MDS shards with an index.json.

Every sample has the columns of `COLUMNS`:

- `id`, unique in its set;
- `image`, the encoded file (JPEG, PNG, ...), not pixels;
- `captions`, a JSON list of one or more strings. Converted sets hold cleaned captions. Readers
  clean them again, which does not change them;
- `source`, the name of the original set;
- `width` and `height` of the image in pixels, 0 if unknown;
- `url` of the image, "" if unknown;
- `similarity` of image and text according to the source, NaN if unknown.

Some sets have more columns (`EXTRA_COLUMNS`):

- `annotations`, a JSON list with one entry per caption: answers, label, candidates, provenance;
- `second_image`, if captions describe two images;
- `roles`, a JSON list with the role of each caption (see `data.captions`);
- `uid` and `sha256` from the source, "" if unknown for a sample;
- `image_place`, only in an index of tars (see `conversion.tar_index`), where `image` is empty.

index.json also has the number of captions of every sample, which is needed for epochs that use
each caption once. Its field `captions` holds one list per shard, or null if all samples of the
shard have one caption. Sets with roles have `caption_roles`, the number of captions of each role.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from blip_scale.data import mds
from blip_scale.data.captions import DEFAULT_ROLE
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.pixels.formats import open_image

COLUMNS = {
    "id": "str",
    "image": "bytes",
    "captions": "json",
    "source": "str",
    "width": "int",
    "height": "int",
    "url": "str",
    "similarity": "float32",
}
EXTRA_COLUMNS = {
    "annotations": "json",
    "second_image": "bytes",
    "roles": "json",
    "uid": "str",
    "sha256": "str",
    "image_place": "json",
}
IMAGE_COLUMNS = ("image", "second_image")
CAPTIONS_KEY = "captions"
ROLES_KEY = "caption_roles"
HASH = "xxh64"


@dataclass(frozen=True)
class Record:
    """One image with its texts, as written to a shard."""

    id: str
    image: bytes
    """The encoded image file, not pixels."""
    caption: str | Sequence[str]
    """One or several captions of the image."""
    source: str
    width: int = 0
    """Width in pixels; if 0, width and height are read from the image before writing."""
    height: int = 0
    url: str = ""
    similarity: float = math.nan
    annotations: Sequence[dict[str, Any]] | None = None
    """One annotation per caption, with the labels of a task."""
    second_image: bytes | None = None
    roles: Sequence[str] | None = None
    """One role per caption."""
    uid: str | None = None
    """Unique id from the source; "" if this sample has none."""
    sha256: str | None = None
    """SHA-256 of the image in the source, hexadecimal; "" if unknown."""
    image_place: tuple[int, int, bool] | None = None
    """Offset and size of the image in its tar, and whether EXIF says that it is not upright."""

    @property
    def extra_columns(self) -> dict[str, str]:
        """Columns of `EXTRA_COLUMNS` that the record has, with their encodings."""
        columns = EXTRA_COLUMNS.items()
        return {name: kind for name, kind in columns if getattr(self, name) is not None}

    @property
    def captions(self) -> list[str]:
        """All captions of the image."""
        return [self.caption] if isinstance(self.caption, str) else list(self.caption)

    def sample(self) -> dict[str, Any]:
        """Return the columns of `COLUMNS` and `EXTRA_COLUMNS`.

        Extra columns are left out if the record has no value for them.

        Raises:
            ValueError: there is no caption, or the number of annotations or roles differs from the
            number of captions.
        """
        if not self.captions:
            raise ValueError(f"the record {self.id!r} has no caption")
        if self.annotations is not None and len(self.annotations) != len(self.captions):
            raise ValueError(f"the record {self.id!r} needs an annotation for each caption")
        try:
            roles = roles_of({"captions": self.captions, "roles": self.roles})
        except ValueError as error:
            raise ValueError(f"the record {self.id!r}: {error}") from error
        width, height = (self.width, self.height) if self.width else _image_size(self.image)
        return {
            "id": self.id,
            "image": self.image,
            "captions": self.captions,
            "source": self.source,
            "width": width,
            "height": height,
            "url": self.url,
            "similarity": self.similarity,
            "roles": roles,
            "uid": self.uid or "",
            "sha256": self.sha256 or "",
            **{name: getattr(self, name) for name in self.extra_columns},
        }


def with_first(records: Iterable[Record]) -> tuple[Record | None, Iterator[Record]]:
    """Return the first record, which shows the set's extra columns, and an iterator over all."""
    every = iter(records)
    first = next(every, None)
    return first, every if first is None else chain([first], every)


def shard_writer(
    folder: Path,
    shard_size: str | int,
    compression: str | None = None,
    extra_columns: Mapping[str, str] | None = None,
) -> mds.Writer:
    """Open a writer for shards of at most `shard_size`, with checksums.

    The shards have the columns of `COLUMNS` and `extra_columns`, a subset of `EXTRA_COLUMNS`.
    """
    columns = COLUMNS | dict(extra_columns or {})
    return mds.Writer(folder, columns, shard_size, compression, (HASH,))


def write_shards(
    folder: Path,
    records: Iterable[Record],
    shard_size: str | int = "64mb",
    compression: str | None = None,
) -> int:
    """Write records as MDS shards of at most `shard_size`, and return their number.

    The shards are written to `folder.partial`, which is renamed at the end. `folder` is therefore
    either complete or missing. A `folder.partial` left by a killed call is deleted.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: there is no record, a record has no caption, or an id occurs twice.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    ids: set[str] = set()
    counts: list[int] = []
    roles: Counter[str] = Counter()
    first, records = with_first(records)
    extra_columns = first.extra_columns if first else {}
    with shard_writer(partial, shard_size, compression, extra_columns) as writer:
        for record in records:
            if record.id in ids:
                raise ValueError(f"{folder}: the id {record.id!r} occurs twice; ids must be unique")
            ids.add(record.id)
            counts.append(len(record.captions))
            roles.update(record.roles or ())
            writer.write(record.sample())
    if not ids:
        shutil.rmtree(partial)
        raise ValueError(f"{folder}: there is no record to write")
    index = json.loads((partial / INDEX_NAME).read_text())
    index[CAPTIONS_KEY] = captions_by_shard(index["shards"], counts)
    if roles:
        index[ROLES_KEY] = dict(sorted(roles.items()))
    (partial / INDEX_NAME).write_text(json.dumps(index, sort_keys=True))
    partial.rename(folder)
    return len(ids)


def read_index(folder: Path) -> list[mds.Shard]:
    """Read the shards named in `folder`/index.json, without opening them.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the index can't be read or lacks columns of `COLUMNS`.
    """
    shards = mds.read_index(folder)
    require_columns(folder, shards)
    return shards


def require_columns(
    folder: Path, shards: Iterable[mds.Shard], names: Iterable[str] = COLUMNS
) -> None:
    """Raise ValueError, naming the index in `folder`, if shards lack a column of `names`."""
    for columns in {shard.columns for shard in shards}:
        missing = set(names) - set(columns.names)
        if missing:
            raise ValueError(
                f"{folder / INDEX_NAME}: the shards lack the columns {sorted(missing)}"
            )


def captions_by_shard(
    shards: Sequence[dict[str, Any]], counts: Sequence[int]
) -> list[list[int] | None]:
    """Split the caption counts of all samples by shard, in order.

    The entry of a shard is None if each of its samples has one caption.
    """
    ends = list(accumulate(shard["samples"] for shard in shards))
    parts = [list(counts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return [None if set(part) <= {1} else part for part in parts]


def read_caption_counts(folder: Path) -> list[list[int] | None]:
    """Read the caption counts of each shard from the index (see `captions_by_shard`).

    Raises:
        ValueError: the index lacks the counts.
    """
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    counts, shards = index.get(CAPTIONS_KEY), index["shards"]
    if not isinstance(counts, list) or len(counts) != len(shards):
        raise ValueError(
            f"{path} lacks the number of captions of each sample: write the set again, or set "
            "`repeat` to a number"
        )
    for part, shard in zip(counts, shards, strict=True):
        if part is not None and not _are_counts(part, shard["samples"]):
            raise ValueError(
                f"{path}: `{CAPTIONS_KEY}` does not hold {shard['samples']} numbers for "
                f"{shard['raw_data']['basename']}: write the set again"
            )
    return counts


def parse_role_counts(value: Any) -> dict[str, int]:
    """Parse the number of captions by role, `ROLES_KEY` of an index; None gives {}.

    Raises:
        ValueError: the value is invalid.
    """
    counts = {} if value is None else value
    if not isinstance(counts, dict) or not all(type(n) is int and n > 0 for n in counts.values()):
        raise ValueError(f"`{ROLES_KEY}` does not hold a number of captions for each role")
    return counts


def require_captions(sample: Mapping[str, Any]) -> None:
    """Raise ValueError if a sample has no caption, or not one role per caption."""
    if not roles_of(sample):
        raise ValueError("the sample has no caption")


def roles_of(sample: Mapping[str, Any]) -> list[str]:
    """Return the roles of a sample's captions.

    Raises:
        ValueError: the captions are not strings, or there is not one role per caption.
    """
    captions, roles = sample["captions"], sample.get("roles")
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError("column 'captions' is not a list of strings")
    if roles is None:
        return [DEFAULT_ROLE] * len(captions)
    if not isinstance(roles, list | tuple) or not all(isinstance(role, str) for role in roles):
        raise ValueError("column 'roles' is not a list of strings")
    if len(roles) != len(captions):
        raise ValueError(f"{len(captions)} captions, but {len(roles)} roles")
    return list(roles)


def _are_counts(part: Any, samples: int) -> bool:
    is_list = isinstance(part, list) and len(part) == samples
    return is_list and all(type(count) is int and count > 0 for count in part)


def _image_size(image: bytes) -> tuple[int, int]:
    """Return width and height from the image's header, or (0, 0) if the header can't be read."""
    try:
        with open_image(image) as opened:
            return opened.size
    except Exception:  # decoders raise different types; decoding reports the error later
        return 0, 0
