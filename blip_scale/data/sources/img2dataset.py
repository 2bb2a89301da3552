"""Read the output of img2dataset: webdataset tars, parquet files with images, or files.

Use it for sets that are published as a list of URLs, such as Conceptual Captions, SBU and LAION.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator
from functools import partial

from blip_scale.data.conversion.fingerprints import of_files
from blip_scale.data.conversion.listing import Listing
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
    read_file,
)

_FAILED = "there is no output of img2dataset (NNNNN.tar, NNNNN.parquet with images, or NNNNN/)"


def chunks(source: Source) -> list[Chunk]:
    """Return one chunk for each shard of img2dataset.

    Raises:
        FileNotFoundError: the folder has no shard.
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
    listed = Listing.of(source.location, source.scratch)
    # Look for tars first: beside tars and folders, img2dataset writes parquet files with metadata.
    if any(entry.name.lower().endswith(webdataset.TAR_ENDINGS) for entry in listed):
        return tars(source)
    folders: dict[str, int] = {}
    for code, entry in listed.items():
        folder = posixpath.dirname(entry.name)
        if folder not in folders and posixpath.basename(folder).isdigit():
            folders[folder] = code
    if folders:
        folder_chunks = []
        for folder, code in sorted(folders.items()):
            run = posixpath.dirname(folder)
            read = partial(read_folder, listed, code, source.caption_key, run)
            folder_chunks.append(Chunk(folder, read, of_files(_files_of(listed, code))))
        return folder_chunks
    if any(entry.name.endswith(".parquet") for entry in listed):
        return parquet.chunks(source)
    raise FileNotFoundError(f"{source.location}: {_FAILED}")


def _files_of(listed: Listing, code: int) -> Iterator[Entry]:
    """Yield the files of the folder whose first file has this code."""
    folder = ""
    for _, entry in listed.items(code):
        folder = folder or posixpath.dirname(entry.name)
        if not entry.name.startswith(f"{folder}/"):
            return
        if posixpath.dirname(entry.name) == folder:
            yield entry


def read_folder(
    listed: Listing, code: int, caption_key: str = "", run: str = ""
) -> Iterator[Found]:
    """Read a folder in img2dataset's format `files`: NNNNN.jpg, NNNNN.txt and NNNNN.json.

    Args:
        listed: files of all folders.
        code: code of the folder's first file.
        caption_key: JSON field with the caption; "" for the .txt or the usual fields.
        run: parent folder, used as a prefix of the ids.
    """
    samples: dict[str, dict[str, str]] = {}
    unused: Counter[str] = Counter()
    for entry in _files_of(listed, code):
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
