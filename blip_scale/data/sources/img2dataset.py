"""Read the output of img2dataset: webdataset tars, parquet files with images, or files.

This serves every set that is published as a list of URLs, such as Conceptual Captions, SBU and
LAION.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator
from functools import partial

from blip_scale.data.conversion.fingerprints import of_files
from blip_scale.data.conversion.pairs import (
    LARGEST_FILE_BYTES,
    Chunk,
    Found,
    Reason,
    Reject,
    Source,
    Unused,
)
from blip_scale.data.sources import parquet, webdataset
from blip_scale.storage.locations import (
    Entry,
    FileTooLarge,
    NotRegularFile,
    extension,
    is_folder,
    list_folder,
    read_file,
)

_FAILED = "there is no output of img2dataset (NNNNN.tar, NNNNN.parquet with images, or NNNNN/)"


def chunks(source: Source) -> list[Chunk]:
    """One chunk for each of img2dataset's shards.

    Raises:
        FileNotFoundError: there is no shard.
        ValueError: the location is a list of URLs, the input of img2dataset.
    """
    tars = partial(webdataset.chunks, id_per_tar=False)
    if not is_folder(source.location):
        ending = extension(source.location)
        if ending in ("tsv", "csv", "json"):
            raise ValueError(
                f"{source.location} is a list of URLs: download the images with img2dataset first "
                "(see docs/data.md), and give the folder that it wrote"
            )
        return parquet.chunks(source) if ending == "parquet" else tars(source)
    listed = list_folder(source.location, deep=True)
    # img2dataset also writes parquet files with the metadata of tars and folders.
    if any(entry.name.lower().endswith(webdataset.TAR_ENDINGS) for entry in listed):
        return tars(source)
    folders: dict[str, list[Entry]] = {}
    for entry in listed:
        folder = posixpath.dirname(entry.name)
        if posixpath.basename(folder).isdigit():
            folders.setdefault(folder, []).append(entry)
    if folders:
        folder_chunks = []
        for folder, entries in sorted(folders.items()):
            run = posixpath.dirname(folder)
            read = partial(read_folder, entries, source.caption_key, run)
            folder_chunks.append(Chunk(folder, read, of_files(entries)))
        return folder_chunks
    if any(entry.name.endswith(".parquet") for entry in listed):
        return parquet.chunks(source)
    raise FileNotFoundError(f"{source.location}: {_FAILED}")


def read_folder(entries: list[Entry], caption_key: str = "", run: str = "") -> Iterator[Found]:
    """Read img2dataset's form `files`: NNNNN.jpg, NNNNN.txt and NNNNN.json beside each other.

    Args:
        entries: files of the folder.
        caption_key: field of the JSON with the caption; "" for the .txt or the usual fields.
        run: folder above, for the ids.
    """
    samples: dict[str, dict[str, str]] = {}
    unused: Counter[str] = Counter()
    for entry in entries:
        name, _, ending = posixpath.basename(entry.name).partition(".")
        if name and webdataset.kind_of(ending.lower()):
            samples.setdefault(name, {})[ending.lower()] = entry.location
        else:
            unused[f"files .{ending.lower()}"] += 1
    for name, files in samples.items():
        sample_id = f"{run}/{name}" if run else name
        try:
            parts = {ending: read_file(path, LARGEST_FILE_BYTES) for ending, path in files.items()}
        except NotRegularFile as error:
            yield Reject(sample_id, Reason.NOT_REGULAR, str(error))
            continue
        except FileTooLarge as error:
            yield Reject(sample_id, Reason.FILE_TOO_LARGE, str(error))
            continue
        sample = webdataset.Sample(sample_id, parts)
        yield from webdataset.sample_pairs(sample, caption_key, unused)
    yield from (Unused(kind, count) for kind, count in sorted(unused.items()))
