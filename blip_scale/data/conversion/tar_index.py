"""Index webdataset tars, so that training reads images from the tars in place.

The index is a set of shards, one per tar, in which `image` is empty and `image_place` holds the
position of the image in the tar. A second index, in the folder `tars`, lists the tars in the same
order, so they are fetched and cached like shards. `set.json` is written last. It holds a hash of
the names, sizes and modification times (ETags in a bucket) of all tars, so an index of other tars
is never used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blip_scale.data.conversion.fingerprints import of_files
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Chunk
from blip_scale.data.conversion.run import PLAN_NAME, Conversion, Part, Progress, convert, read_plan
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.mds import INDEX_NAME, OFFSET_LIMIT, check_shard_name
from blip_scale.data.reading.cache import TAR_LIST
from blip_scale.data.sources.webdataset import (
    TAR_ENDINGS,
    file_chunk,
    find_files,
    read_tar,
    without_ending,
)
from blip_scale.storage.locations import Entry, is_folder, join, read_file
from blip_scale.storage.untrusted import parse_json

STAMP_NAME = "set.json"
_FORMAT = 1
_SHARD_BYTES = OFFSET_LIMIT - 1
_LARGEST_STAMP_BYTES = 1 << 16


@dataclass(frozen=True)
class IndexJob:
    """Settings for indexing tars."""

    tars: str
    """Folder or bucket of the tars."""
    out: str
    """Folder or bucket of the index."""
    rules: Rules = field(default_factory=partial(Rules, "tars", in_place=True))
    """Rules for accepting pairs; images are not decoded."""
    caption_key: str = ""
    """JSON field with the caption; "" for the .txt or the usual fields."""
    workers: int = 1
    scratch: str | None = None
    """Folder for temporary shards of a remote index; None for the system's."""


def list_tars(location: str) -> list[Entry]:
    """List the tars below a folder in the order of their names.

    Raises:
        FileNotFoundError: the folder has no tar.
        ValueError: a tar can't be read in place.
    """
    if not is_folder(location):
        raise ValueError(f"{location} is a file: name the folder of the tars")
    tars, _ = find_files(location, TAR_ENDINGS)
    if not tars:
        raise FileNotFoundError(f"{location}: there is no .tar")
    for tar in tars:
        check_shard_name(tar.name)
        if not tar.name.endswith(".tar"):
            raise ValueError(
                f"{tar.location} is compressed: unpack it, or convert it to MDS shards"
            )
        if tar.size >= OFFSET_LIMIT:
            raise ValueError(f"{tar.location} has {tar.size / 1e9:.1f} GB: split it below 4.29 GB")
    return tars


def is_current(index: str, tars: Sequence[Entry]) -> bool:
    """Whether a folder or bucket holds the index of exactly these tars.

    Raises:
        ValueError: the index has the format of another release.
    """
    try:
        content = read_file(join(index, STAMP_NAME), _LARGEST_STAMP_BYTES)
    except FileNotFoundError:
        return False
    stamp = parse_json(content)
    if not isinstance(stamp, dict) or stamp.get("format") != _FORMAT:
        raise ValueError(f"{index} is an index of tars by another release: remove it")
    return bool(stamp.get("tars") == of_files(tars))


def write_index(
    job: IndexJob,
    part: Part | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
    start_method: str = "spawn",
) -> dict[str, Any] | None:
    """Index all tars, or one machine's part of them. The same call continues after a kill.

    If an index of other tars or with other settings exists, it is replaced. With several parts,
    this is an error.

    Args:
        job: the whole index.
        part: the tars to index here; None for all.
        show: called with the progress several times a second.
        start_method: start method of processes (see `Conversion`).

    Returns:
        The summary of the whole set, or None if other parts are not finished.

    Raises:
        FileNotFoundError: the folder has no tar.
        ValueError: a tar can't be read in place, or another process is writing the index.
    """
    part = part or Part()
    tars = list_tars(job.tars)
    chunks = [_chunk(tar, job.caption_key) for tar in tars]
    conversion = Conversion(
        chunks, job.out, job.rules, _SHARD_BYTES, job.workers, job.scratch,
        start_method, None, {"caption_key": job.caption_key},
    )  # fmt: skip
    out = OutputFolder(job.out, job.scratch)
    is_other = out.has(PLAN_NAME) and read_plan(out) != _as_read(conversion.plan())
    if is_other and part.of > 1:
        raise ValueError(
            f"{job.out} is an index of other tars, or with other options: remove it, then run all "
            "parts again"
        )
    if is_other:
        out.discard([STAMP_NAME])
    summary = convert(conversion, part, show, overwrite=is_other)
    if summary is not None and summary["pairs"]["written"]:
        _write_list(out, tars)
    return summary


def _chunk(tar: Entry, caption_key: str) -> Chunk:
    prefix = f"{without_ending(tar.name, TAR_ENDINGS)}/"
    return file_chunk(tar, partial(read_tar, tar.location, caption_key, prefix))


def _as_read(plan: dict[str, Any]) -> Any:
    return json.loads(json.dumps(plan))


def _write_list(out: OutputFolder, tars: Sequence[Entry]) -> None:
    """Write the list of the tars that have samples, then `set.json`."""
    listed = []
    for shard in json.loads(out.read(INDEX_NAME))["shards"]:
        tar = tars[int(shard["raw_data"]["basename"].split(".")[1])]
        file = {"basename": tar.name, "bytes": tar.size, "hashes": {}}
        # The version distinguishes lists of different tars that have equal names and sizes.
        listed.append(shard | {"raw_data": file, "zip_data": None, "tar_version": tar.version})
    with out.workshop("list", per_process=True) as folder:
        (folder / TAR_LIST).mkdir()
        names = [f"{TAR_LIST}/{INDEX_NAME}", STAMP_NAME]
        _write(folder / names[0], {"version": 2, "shards": listed})
        _write(folder / names[1], {"format": _FORMAT, "tars": of_files(tars)})
        out.put(folder, names)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")
