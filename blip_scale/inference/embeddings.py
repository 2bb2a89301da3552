"""Features of a data set as parquet files. A restart continues an interrupted export.

The samples are divided into parts of equal size. `images_00000.parquet` has one row for every
sample of the first part: `id`, `features` and `error`, where one of the last two is null.
`texts_00000.parquet` has one row for every caption: `id`, `caption`, `features`. Features are
L2-normalised. A part is complete when its `images_` file has its final name.
Shapes: I images, S texts, E embed_dim.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.errors import RefusedInput
from blip_scale.inference.blip import Blip
from blip_scale.inference.images import batched, done_ahead, pixels_of
from blip_scale.storage.output_files import naming_full_disk
from blip_scale.storage.untrusted import parse_json

VERSION = 1
MANIFEST = "embeddings.json"
INDEX = "images.faiss"
_BLOCK = 1000
"""Number of samples whose positions in shards are computed together."""


@dataclass(frozen=True)
class Sample:
    """Image and texts of a data set."""

    id: str
    image: bytes
    captions: list[str]


@dataclass(frozen=True)
class SampleSet:
    """The samples of a data set, by index."""

    count: int
    fingerprint: str
    """Hash that changes if the samples or their order change."""
    read: Callable[[int], Sample]
    place: Callable[[int], str]
    """Function that names a sample, for samples that cannot be read."""


@dataclass(frozen=True)
class Content:
    """All settings that determine the content of the files; stored in `MANIFEST`."""

    checkpoint: str
    """Hash of the weights."""
    data: str
    """Fingerprint of the samples."""
    samples: int
    width: int
    """Number of elements of a feature."""
    dtype: str
    """Type of the features, `float32` or `float16`."""
    texts: bool
    """Whether captions are also embedded."""
    part_size: int
    """Number of samples per part."""
    image_size: int
    version: int = VERSION

    @property
    def parts(self) -> list[range]:
        """Indices of the samples of each part."""
        starts = range(0, self.samples, self.part_size)
        return [range(start, min(start + self.part_size, self.samples)) for start in starts]

    @property
    def image_bytes(self) -> int:
        """Size of the features of all images in bytes."""
        return self.samples * self.width * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Row:
    """A decoded sample, ready for the network."""

    sample: Sample
    pixels: Tensor | None
    """Pixels, uint8 [3, side, side]; None if the image cannot be decoded."""
    error: str | None = None


def sample_set(folder: Path, remote: str | None, images: Sequence[str]) -> SampleSet:
    """Open the MDS shards in `folder`, or the image files `images` below it.

    Args:
        folder: folder of the shards, cache of the shards at `remote`, or folder of images.
        remote: URL of the shards; None if they are in `folder`.
        images: paths of image files; empty for shards.

    Raises:
        FileNotFoundError, ValueError: the shards are missing or damaged.
    """
    if images:
        digest = xxhash.xxh3_64()
        for path in images:
            digest.update(f"{path}\0{Path(path).stat().st_size}\0".encode(errors="surrogateescape"))

        def name(number: int) -> str:
            """Return the path relative to the folder. Bytes that are not UTF-8 are escaped."""
            path = Path(images[number])
            path = path.relative_to(folder) if path.is_relative_to(folder) else path
            return str(path).encode(errors="backslashreplace").decode()

        def read_file(number: int) -> Sample:
            return Sample(name(number), Path(images[number]).read_bytes(), [])

        return SampleSet(len(images), digest.hexdigest(), read_file, name)
    store = StreamStore(StreamRecipe(folder.name, str(folder), remote))

    @lru_cache(maxsize=64)
    def places(block: int) -> list[tuple[int, int]]:
        start = block * _BLOCK
        return store.places(range(start, min(start + _BLOCK, store.samples)))

    def located(number: int) -> tuple[int, int]:
        return places(number // _BLOCK)[number % _BLOCK]

    def read(number: int) -> Sample:
        try:
            columns = store.read(*located(number))
        except FileNotFoundError as error:  # a whole shard is missing, not one sample
            raise RefusedInput(str(error)) from error
        return Sample(columns["id"], columns["image"], list(columns["captions"]))

    def place(number: int) -> str:
        shard, row = located(number)
        return f"{store.shard_name(shard)}:{row}"

    fingerprint = xxhash.xxh3_64_hexdigest((store.folder / INDEX_NAME).read_bytes())
    return SampleSet(store.samples, fingerprint, read, place)


def prepare(out: Path, content: Content) -> list[int]:
    """Create or check the output folder, and list the indices of the missing parts.

    Raises:
        ValueError: the folder holds features of other data or settings. The message names them.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / MANIFEST
    stated = asdict(content)
    if file.is_file():
        before = _stated(file)
        differing = [name for name, value in stated.items() if before.get(name) != value]
        if differing:
            raise ValueError(
                f"{out} holds embeddings with another {', '.join(differing)}; give another OUT, or "
                "delete it"
            )
    else:
        _replace(file, lambda place: place.write_text(json.dumps(stated, indent=2) + "\n"))
    numbers = range(len(content.parts))
    return [number for number in numbers if not part_file(out, "images", number).is_file()]


def _stated(file: Path) -> dict[str, Any]:
    """Read the content of a `MANIFEST`.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); give another OUT, or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a manifest of embeddings; give another OUT, or delete it")
    return content


def part_file(out: Path, kind: str, number: int) -> Path:
    """Return the path of a part. `kind` is images or texts."""
    return out / f"{kind}_{number:05d}.parquet"


def embed_part(
    blip: Blip, samples: SampleSet, content: Content, number: int, batch: tuple[int, int], out: Path
) -> Iterator[tuple[int, int]]:
    """Write the files of a part. Yield the numbers of images and of unreadable ones per batch.

    Args:
        blip: checkpoint with contrastive features.
        samples: the data set.
        content: settings of the files.
        number: index of the part.
        batch: samples per batch, and number of decoding threads.
        out: folder of the files.
    """
    batch_size, threads = batch
    read = partial(_read_row, samples, content.image_size)
    images: dict[str, list[Any]] = {"id": [], "features": [], "error": []}
    texts: dict[str, list[Any]] = {"id": [], "caption": [], "features": []}
    for group in batched(done_ahead(content.parts[number], read, threads), batch_size):
        rows = []
        for item in group:
            row = item.result
            rows.append(row or Row(Sample(samples.place(item.item), b"", []), None, item.error))
        images["id"] += [row.sample.id for row in rows]
        images["error"] += [row.error for row in rows]
        images["features"] += _image_features(blip, rows)
        captions = [(row.sample.id, text) for row in rows for text in row.sample.captions]
        if content.texts and captions:
            texts["id"] += [name for name, _ in captions]
            texts["caption"] += [text for _, text in captions]
            features = blip.text_features([text for _, text in captions])
            texts["features"].extend(features.numpy())
        yield len(rows), sum(row.error is not None for row in rows)
    if content.texts:
        _write_table(part_file(out, "texts", number), texts, content)
    _write_table(part_file(out, "images", number), images, content)


def _read_row(samples: SampleSet, image_size: int, number: int) -> Row:
    sample = samples.read(number)
    try:
        pixels = pixels_of(sample.image, image_size, upright=True)
    except CorruptSample as error:
        return Row(replace(sample, image=b""), None, str(error))
    return Row(replace(sample, image=b""), pixels)


def _image_features(blip: Blip, rows: Sequence[Row]) -> list[np.ndarray | None]:
    """Compute the features of each row; None for rows without pixels."""
    pixels = [row.pixels for row in rows if row.pixels is not None]
    features: Iterator[np.ndarray] = iter(())
    if pixels:
        features = iter(blip.image_features(blip.image_embeds(torch.stack(pixels))).numpy())
    return [None if row.pixels is None else next(features) for row in rows]


def _write_table(file: Path, columns: dict[str, list[Any]], content: Content) -> None:
    number = pa.float16() if content.dtype == "float16" else pa.float32()
    kind = pa.list_(number, content.width)
    rows = [None if row is None else row.astype(content.dtype) for row in columns.pop("features")]
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    table = pa.table(arrays | {"features": pa.array(rows, kind)})
    _replace(file, lambda place: pq.write_table(table, place, compression="zstd"))


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, and rename it when it is complete."""
    place = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with naming_full_disk(file):
            write(place)
        place.replace(file)
    finally:
        place.unlink(missing_ok=True)


def require_faiss() -> None:
    """Raise ValueError if faiss is not installed."""
    try:
        import faiss  # noqa: F401  an optional dependency
    except ImportError as error:
        raise ValueError(f"--faiss: {error}; run `pip install faiss-cpu`") from error


def write_faiss(out: Path, content: Content) -> int:
    """Write an exact inner-product index of all images. Its ids are the samples' indices.

    Returns:
        Number of images in the index.
        number of images in the index.
    """
    import faiss

    index = faiss.IndexIDMap2(faiss.IndexFlatIP(content.width))
    for number, samples in enumerate(content.parts):
        file = part_file(out, "images", number)
        try:
            table = pq.read_table(file, columns=["features"])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is damaged ({error}); delete it and run the same command"
            ) from error
        column = table["features"].combine_chunks()
        numbers = np.array(samples)[column.is_valid().to_numpy(zero_copy_only=False)]
        features = column.drop_null().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        if len(numbers):
            index.add_with_ids(features.reshape(len(numbers), content.width), numbers)
    _replace(out / INDEX, lambda place: faiss.write_index(index, str(place)))
    return int(index.ntotal)
