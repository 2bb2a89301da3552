"""Image files: find them by path, folder or glob, and decode them in advance in threads."""

from __future__ import annotations

import glob
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image, ImageOps
from torch import Tensor

from blip_scale.data.pixels.decoding import decode_image, to_rgb
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.pixels.transforms import EvalTransform
from blip_scale.data.reading.stream_store import CorruptSample
from blip_scale.inference.arguments import paths_of

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 64
"""Number of images that are decoded in advance."""


@dataclass(frozen=True)
class Done(Generic[T, R]):
    """Result of the work on an item, or the reason why it failed."""

    item: T
    result: R | None
    error: str = ""


def find_images(patterns: str | Path | Sequence[str | Path]) -> list[str]:
    """List the paths of images without duplicates.

    Args:
        patterns: one or several files, folders (all images below them) or globs. A pattern that is
            an existing path is that path, even if it is also a valid glob.

    Raises:
        FileNotFoundError: no image matches a pattern. The message names it.
    """
    unique: dict[str, None] = {}
    for pattern in paths_of(patterns):
        if not pattern:  # Path("") would be the working directory
            raise FileNotFoundError("'': there is no image; give a file, a folder or a glob")
        paths = [Path(pattern)]
        if not paths[0].exists():
            paths = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207  any root
        images = list(chain.from_iterable(map(_images_of, paths)))
        if not images:
            raise FileNotFoundError(f"{pattern}: there is no image")
        unique |= dict.fromkeys(map(str, images))
    return list(unique)


def _images_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [file for file in files if file.suffix.lower().lstrip(".") in IMAGE_ENDINGS]
    return [path] if path.is_file() else []


def pixels_of(image: bytes | Image.Image, size: int, upright: bool = False) -> Tensor:
    """Decode an image as in the published evaluation.

    Args:
        image: content of an image file, or a PIL image of any mode.
        size: side of the result in pixels.
        upright: whether to rotate the image according to EXIF.

    Returns:
        uint8 [3, size, size], resized to a square by bicubic interpolation.

    Raises:
        CorruptSample: the image cannot be decoded.
        ValueError: `image` is of another type, such as a path.
    """
    if isinstance(image, Image.Image):
        decoded = to_rgb(ImageOps.exif_transpose(image) if upright else image)
    elif isinstance(image, bytes):
        decoded = decode_image(image, upright)
    else:
        raise ValueError(
            f"image: expected the bytes of a file (Path(...).read_bytes()) or a PIL image, found "
            f"{type(image).__name__}"
        )
    return EvalTransform(size)(decoded).contiguous()


def done_ahead(items: Iterable[T], work: Callable[[T], R], threads: int) -> Iterator[Done[T, R]]:
    """Run `work` on every item in advance in threads, and yield the results in order.

    OSError and CorruptSample become the error of their item.
    """

    def work_on(item: T) -> Done[T, R]:
        try:
            return Done(item, work(item))
        except (OSError, CorruptSample) as error:
            return Done(item, None, str(error))

    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Done[T, R]]] = deque()
        while True:
            for item in islice(remaining, _AHEAD + threads - len(ahead)):
                ahead.append(pool.submit(work_on, item))
            if not ahead:
                return
            yield ahead.popleft().result()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield groups of `size` items; the last may be smaller. A size below 1 raises ValueError."""
    if size < 1:
        raise ValueError(f"batch size {size}: expected 1 or more")
    remaining = iter(items)
    while group := list(islice(remaining, size)):
        yield group
