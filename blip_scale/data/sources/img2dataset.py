"""The output of img2dataset in its three forms: webdataset tars, parquet with images, and files.

Serves every set that is published as a list of URLs: Conceptual Captions, SBU, LAION.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from blip_scale.data.conversion.pairs import Chunk, Found, Reason, Reject, Source
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.sources import parquet, webdataset
from blip_scale.data.sources.metadata import TEXT_ENDINGS
from blip_scale.storage.locations import (
    NotRegularFile,
    extension,
    is_folder,
    list_folder,
    read_file,
    stem,
)

_FAILED = "there is no output of img2dataset (NNNNN.tar, NNNNN.parquet with images, or NNNNN/)"


def chunks(source: Source) -> list[Chunk]:
    """One chunk for each of img2dataset's shards.

    Raises FileNotFoundError where none is found, ValueError for the lists of URLs from which
    img2dataset starts.
    """
    if not is_folder(source.location):
        ending = extension(source.location)
        if ending in ("tsv", "csv", "json"):
            raise ValueError(
                f"{source.location} is a list of URLs: fetch the images with img2dataset first "
                "(docs/data.md has the command) and give the folder that it wrote"
            )
        return (parquet if ending == "parquet" else webdataset).chunks(source)
    listed = list_folder(source.location)
    # Beside tars and folders lie parquet files too, with the metadata alone.
    if any(entry.name.endswith(webdataset.TAR_ENDINGS) for entry in listed):
        return webdataset.chunks(source)
    folders = [entry for entry in listed if entry.is_folder and entry.name.isdigit()]
    if folders:
        return [
            Chunk(
                folder.name,
                partial(read_folder, folder.location, source.caption_key),
                fingerprint="",
            )
            for folder in folders
        ]
    if any(entry.name.endswith(".parquet") for entry in listed):
        return parquet.chunks(source)
    raise FileNotFoundError(f"{source.location}: {_FAILED}")


def read_folder(location: str, caption_key: str = "") -> Iterator[Found]:
    """The form `files`: NNNNN.jpg, NNNNN.txt and NNNNN.json beside each other."""
    samples: dict[str, dict[str, str]] = {}
    for entry in list_folder(location):
        ending = extension(entry.name)
        if not entry.is_folder and ending in (*IMAGE_ENDINGS, *TEXT_ENDINGS, "json"):
            samples.setdefault(stem(entry.name), {})[ending] = entry.location
    for name, files in samples.items():
        try:
            parts = {ending: read_file(path) for ending, path in files.items()}
        except NotRegularFile as error:
            yield Reject(name, Reason.NOT_REGULAR, str(error))
            continue
        yield webdataset.sample_pair(name, parts, caption_key)
