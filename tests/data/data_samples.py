"""Pictures, recipes and types for the tests of this folder."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.loading.loader import TrainLoader
from blip_scale.data.loading.micro_batches import Batch
from blip_scale.data.reading import prefetch
from blip_scale.storage import objects

MakeShards = Callable[..., Path]
MakeLoader = Callable[..., TrainLoader]
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "ein",
    "hund",
    "katze",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "##b",
    "pair",
    ",",
]


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture: red grows to the right, green downwards; no channel reaches 0."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([40 + columns * 2, 60 + rows * 3, 90 + (rows + columns)], axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode an image in a format."""
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A small picture, different for each `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG")
    return encoded.getvalue()


def stream(folder: Path, remote: Path | str | None = None, **settings: float | str) -> StreamRecipe:
    """A stream named like its folder, or like the remote without a suffix `-1a2b3c4d`."""
    return StreamRecipe(
        name=re.sub(r"-[0-9a-f]{8}$", "", Path(remote or folder).name),
        local=str(folder),
        remote=str(remote) if remote else None,
        **settings,  # type: ignore[arg-type]
    )


def hurry() -> None:
    """Shorten pauses and timeouts for remotes that are slow or fail, in workers as well."""
    objects.FIRST_PAUSE_S, objects.LONGEST_PAUSE_S, prefetch.POLL_S = 0.05, 0.5, 0.02


def take(loader: TrainLoader, count: int) -> list[Batch]:
    """Take the next batches, and end the workers."""
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches
