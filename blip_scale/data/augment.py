"""RandAugment as BLIP uses it, on uint8 tensors, with a random generator that the caller owns.

Warps are OpenCV's (as published), contrast and equalisation Pillow's, within one grey level.

Legend: H and W the sides of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_FILL = 128
_OPERATIONS_PER_IMAGE = 2  # RandAugment's N
_MAGNITUDE = 5 / 10  # RandAugment's M of 10
_PROBABILITY = 0.5

ENHANCE_FACTOR = 0.1 + 1.8 * _MAGNITUDE
"""1.0: at M=5 the published brightness and sharpness change nothing."""
SHEAR = 0.3 * _MAGNITUDE
TRANSLATE_PX = round(10 * _MAGNITUDE)
"""Pixels whatever the image size, as published."""
ROTATE_DEGREES = 30 * _MAGNITUDE


def rand_augment(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Two of the ten operations, drawn with replacement, each applied with probability 0.5.

    Args:
        image: uint8 [3, H, W], contiguous; it is not changed.
    """
    for choice in rng.integers(0, len(OPERATIONS), size=_OPERATIONS_PER_IMAGE):
        applied, sign = rng.random() < _PROBABILITY, 1 if rng.random() < 0.5 else -1
        if applied:
            image = OPERATIONS[choice](image, sign)
    return image


def _unchanged(image: Tensor, sign: int) -> Tensor:
    return image


def _auto_contrast(image: Tensor, sign: int) -> Tensor:
    # PIL's meaning: stretch every channel from its minimum to its maximum. The published numpy
    # version negates the minimum in uint8, which wraps and drives most such channels to white.
    flat = image.reshape(3, -1)
    low, high = flat.amin(dim=1).tolist(), flat.amax(dim=1).tolist()
    levels = np.arange(256)
    tables = []
    for darkest, brightest in zip(low, high, strict=True):
        scale = 255 / (brightest - darkest) if brightest > darkest else 1.0
        offset = -darkest * scale if brightest > darkest else 0.0
        tables.append(levels * scale + offset)
    return _look_up(image, tables)


def _equalize(image: Tensor, sign: int) -> Tensor:
    return _look_up(image, [_equal_levels(channel) for channel in image])


def _equal_levels(channel: Tensor) -> np.ndarray:
    counts = torch.bincount(channel.reshape(-1), minlength=256).numpy()
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    if step == 0:
        return np.arange(256)
    return (step // 2 + np.cumsum(counts) - counts) // step


def _look_up(image: Tensor, tables: list[np.ndarray]) -> Tensor:
    """Replace every level of channel i by tables[i][level], clipped to 0..255 and truncated."""
    # bytes.translate is the fastest look-up there is: 0.02 ms a channel, numpy.take 0.03 ms.
    result = np.empty(image.shape, dtype=np.uint8)
    for channel, table, out in zip(image.numpy(), tables, result, strict=True):
        levels = table.clip(0, 255).astype(np.uint8).tobytes()
        out.ravel()[:] = np.frombuffer(channel.tobytes().translate(levels), dtype=np.uint8)
    return torch.from_numpy(result)


def _shear_x(image: Tensor, sign: int) -> Tensor:
    return _warp(image, (1.0, -sign * SHEAR, 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Tensor, sign: int) -> Tensor:
    return _warp(image, (1.0, 0.0, 0.0, -sign * SHEAR, 1.0, 0.0))


def _translate_x(image: Tensor, sign: int) -> Tensor:
    return _translate_y(image.mT, sign).mT.contiguous()


def _translate_y(image: Tensor, sign: int) -> Tensor:
    result = torch.full_like(image, _FILL)
    if sign > 0:
        result[:, :-TRANSLATE_PX] = image[:, TRANSLATE_PX:]
    else:
        result[:, TRANSLATE_PX:] = image[:, :-TRANSLATE_PX]
    return result


def _rotate(image: Tensor, sign: int) -> Tensor:
    angle = math.radians(sign * ROTATE_DEGREES)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.shape[2] / 2, image.shape[1] / 2
    return _warp(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _warp(image: Tensor, matrix: tuple[float, ...]) -> Tensor:
    """Bilinear affine warp; `matrix` maps pixels of the result to those of the source."""
    # grid_sample knows no fill but 0.
    shifted = image[None].float().sub_(_FILL)
    grid = _source_grid(matrix, image.shape[1], image.shape[2])
    warped = F.grid_sample(shifted, grid, padding_mode="zeros", align_corners=False)
    levels = warped[0].add_(_FILL + 0.5).numpy().astype(np.uint8)  # torch's cast: 0.06 ms slower
    return torch.from_numpy(levels)


@lru_cache(maxsize=8)  # the six warps of one image size
def _source_grid(matrix: tuple[float, ...], height: int, width: int) -> Tensor:
    """Where each pixel of the result lies in the source, float32 [1, H, W, 2], -1 to 1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    a, b, c, d, e, f = matrix
    grid = [(2 * (a * x + b * y + c) + 1) / width - 1, (2 * (d * x + e * y + f) + 1) / height - 1]
    return torch.from_numpy(np.stack(grid, axis=2).astype(np.float32))[None]


OPERATIONS: tuple[Callable[[Tensor, int], Tensor], ...] = (
    _unchanged,  # identity
    _auto_contrast,
    _unchanged,  # brightness by ENHANCE_FACTOR
    _unchanged,  # sharpness by ENHANCE_FACTOR
    _equalize,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _rotate,
)
