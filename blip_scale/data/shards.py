"""The on-disk form of image-text pairs: a folder of MDS shards with an index.json.

Every sample has the columns of `COLUMNS`:

- `id`, unique in its set;
- `image`, the encoded file (JPEG, PNG, ...), not pixels;
- `captions`, a JSON list of one or more texts; converted sets hold them cleaned, and they are
  cleaned again when read, which changes nothing;
- `source`, the set that it is from;
- `width` and `height` of the image in pixels, 0 where it can't be read;
- `url`, where the image was found, "" where unknown;
- `similarity` of image and text as the source gives it, NaN where it gives none.

Sets of the fine-tuning tasks, and those of CapFilt, have one or two columns more (`EXTRA_COLUMNS`):

- `annotations`, a JSON list with an entry for each of the captions: answers, label, candidates,
  provenance;
- `second_image`, where a caption speaks of two images.

Beside the shards index.json names the number of captions of every sample, so that an epoch can take
each caption once: `captions`, a list a shard, or null where all samples of a shard have one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from blip_scale.data import mds
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
EXTRA_COLUMNS = {"annotations": "json", "second_image": "bytes"}
IMAGE_COLUMNS = ("image", "second_image")
CAPTIONS_KEY = "captions"
HASH = "xxh64"


@dataclass(frozen=True)
class Record:
    """One image with its text as it is written."""

    id: str
    image: bytes
    """The encoded image file, not pixels."""
    caption: str | Sequence[str]
    """One text, or several of the same image."""
    source: str
    width: int = 0
    """Pixels; where it is 0, both sides are read from the image when it is written."""
    height: int = 0
    url: str = ""
    similarity: float = math.nan
    annotations: Sequence[dict[str, Any]] | None = None
    """What the task knows of each caption, one each."""
    second_image: bytes | None = None

    @property
    def extra_columns(self) -> dict[str, str]:
        """Those of `EXTRA_COLUMNS` that the record has."""
        return {
            name: kind for name, kind in EXTRA_COLUMNS.items() if getattr(self, name) is not None
        }

    @property
    def captions(self) -> list[str]:
        return [self.caption] if isinstance(self.caption, str) else list(self.caption)

    def sample(self) -> dict[str, Any]:
        """The columns of `COLUMNS`, and of `EXTRA_COLUMNS` those that are there.

        Raises ValueError where there is no caption, or not one annotation for each.
        """
        if not self.captions:
            raise ValueError(f"the record {self.id!r} has no caption")
        if self.annotations is not None and len(self.annotations) != len(self.captions):
            raise ValueError(f"the record {self.id!r} needs an annotation for each caption")
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
            **{name: getattr(self, name) for name in self.extra_columns},
        }


def with_first(records: Iterable[Record]) -> tuple[Record | None, Iterator[Record]]:
    """The first record, which tells the extra columns of the set, and all of them."""
    every = iter(records)
    first = next(every, None)
    return first, every if first is None else chain([first], every)


def shard_writer(
    folder: Path, shard_size: str | int, compression: str | None = None, first: Record | None = None
) -> mds.Writer:
    """A writer of shards of at most `shard_size` with our columns, the extra ones of the first
    record, and checksums."""
    columns = COLUMNS | (first.extra_columns if first else {})
    return mds.Writer(folder, columns, shard_size, compression, (HASH,))


def write_shards(
    folder: Path,
    records: Iterable[Record],
    shard_size: str = "64mb",
    compression: str | None = None,
) -> int:
    """Write `records` as MDS shards of at most `shard_size` into `folder`; returns their number.

    The shards go to `folder.partial`, which is renamed when all is written: `folder` is whole or
    not there. What an earlier, killed call left in `folder.partial` is thrown away. Raises
    FileExistsError where `folder` exists and ValueError for an empty set, a record without a
    caption or an id seen twice.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    ids: set[str] = set()
    counts: list[int] = []
    first, records = with_first(records)
    with shard_writer(partial, shard_size, compression, first) as writer:
        for record in records:
            if record.id in ids:
                raise ValueError(f"{folder}: the id {record.id!r} comes twice; ids must be unique")
            ids.add(record.id)
            counts.append(len(record.captions))
            writer.write(record.sample())
    if not ids:
        shutil.rmtree(partial)
        raise ValueError(f"{folder}: there is no record to write")
    index = json.loads((partial / INDEX_NAME).read_text())
    index[CAPTIONS_KEY] = captions_by_shard(index["shards"], counts)
    (partial / INDEX_NAME).write_text(json.dumps(index, sort_keys=True))
    partial.rename(folder)
    return len(ids)


def read_index(folder: Path) -> list[mds.Shard]:
    """All shards that `folder`/index.json names, without opening them.

    Raises FileNotFoundError without an index, ValueError for one that can't be read or that
    doesn't have the columns of `COLUMNS`.
    """
    shards = mds.read_index(folder)
    require_columns(folder, shards)
    return shards


def require_columns(folder: Path, shards: Iterable[mds.Shard]) -> None:
    """Raises ValueError, naming the index in `folder`, for shards without those of `COLUMNS`."""
    for columns in {shard.columns for shard in shards}:
        missing = set(COLUMNS) - set(columns.names)
        if missing:
            raise ValueError(
                f"{folder / INDEX_NAME}: the shards lack the columns {sorted(missing)}"
            )


def captions_by_shard(
    shards: Sequence[dict[str, Any]], counts: Sequence[int]
) -> list[list[int] | None]:
    """What the index says of the captions: `counts` are those of all samples in their order."""
    ends = list(accumulate(shard["samples"] for shard in shards))
    parts = [list(counts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return [None if set(part) <= {1} else part for part in parts]


def read_caption_counts(folder: Path) -> list[list[int] | None]:
    """What `captions_by_shard` put into the index, for each shard.

    Raises ValueError for an index without it.
    """
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    counts, shards = index.get(CAPTIONS_KEY), index["shards"]
    if not isinstance(counts, list) or len(counts) != len(shards):
        raise ValueError(
            f"{path} does not say how many captions each sample has: write the set again, or give "
            "`repeat` as a number"
        )
    for part, shard in zip(counts, shards, strict=True):
        if part is not None and not _are_counts(part, shard["samples"]):
            raise ValueError(
                f"{path}: `{CAPTIONS_KEY}` holds no {shard['samples']} numbers for "
                f"{shard['raw_data']['basename']}: write the set again"
            )
    return counts


def _are_counts(part: Any, samples: int) -> bool:
    is_list = isinstance(part, list) and len(part) == samples
    return is_list and all(type(count) is int and count > 0 for count in part)


def _image_size(image: bytes) -> tuple[int, int]:
    """Width and height by the header alone; (0, 0) where it can't be read."""
    try:
        with open_image(image) as opened:
            return opened.size
    except Exception:  # each format fails in its own way; who decodes it will say so
        return 0, 0
