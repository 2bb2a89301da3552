"""Image files: found by path, folder or glob, and decoded ahead in threads."""

from __future__ import annotations

import glob
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.pixels.formats import IMAGE_ENDINGS
from blip_scale.data.pixels.transforms import EvalTransform
from blip_scale.data.reading.stream_store import CorruptSample

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 64
"""Images that are decoded before they are asked for."""


@dataclass(frozen=True)
class Done(Generic[T, R]):
    """What came of an item, or why nothing did."""

    item: T
    result: R | None
    error: str = ""


def find_images(patterns: Sequence[str]) -> list[str]:
    """Paths of images: files as they are given, all images below folders, and what globs match. A
    pattern that is an existing path means that path.

    Raises:
        FileNotFoundError: a pattern without any image; names it.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        paths = [Path(pattern)]
        if not paths[0].exists():
            paths = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207  any root
        images = [image for path in paths for image in _images_of(path)]
        if not images:
            raise FileNotFoundError(f"{pattern}: there is no image")
        found |= dict.fromkeys(map(str, images))
    return list(found)


def _images_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [file for file in files if file.suffix.lower().lstrip(".") in IMAGE_ENDINGS]
    return [path] if path.is_file() else []


def pixels_of(encoded: bytes, size: int, upright: bool = False) -> Tensor:
    """An encoded image as published evaluation sees it: uint8 [3, size, size], resized to a square,
    bicubic. Raises CorruptSample for what can't be decoded; `upright`: see `decode_image`."""
    return EvalTransform(size)(decode_image(encoded, upright)).contiguous()


def done_ahead(items: Iterable[T], work: Callable[[T], R], threads: int) -> Iterator[Done[T, R]]:
    """`work` of every item, in order, done ahead in threads; OSError and CorruptSample are that
    item's errors."""

    def one(item: T) -> Done[T, R]:
        try:
            return Done(item, work(item))
        except (OSError, CorruptSample) as error:
            return Done(item, None, str(error))

    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Done[T, R]]] = deque()
        while True:
            for item in islice(remaining, _AHEAD + threads - len(ahead)):
                ahead.append(pool.submit(one, item))
            if not ahead:
                return
            yield ahead.popleft().result()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Groups of `size`, the last one perhaps smaller; raises ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"a batch size of {size} holds nothing; give 1 or more")
    remaining = iter(items)
    while group := list(islice(remaining, size)):
        yield group
