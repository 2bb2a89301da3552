"""RandAugment as in BLIP, with an explicit random generator.

Warps use OpenCV, as published. Contrast and equalisation follow Pillow.

Legend: H and W height and width of the image.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Pixels = np.ndarray
"""Image as uint8 [H, W, 3]."""

cv2.setNumThreads(0)  # OpenCV's threads do not survive the fork of a loader worker

_FILL = 128
_OPERATIONS_PER_IMAGE = 2  # RandAugment's N
_MAGNITUDE = 5 / 10  # RandAugment's M of 10
_PROBABILITY = 0.5

ENHANCE_FACTOR = 0.1 + 1.8 * _MAGNITUDE
"""Factor of brightness and sharpness; at M=5 it is 1.0, so both published operations change
nothing."""
SHEAR = 0.3 * _MAGNITUDE
TRANSLATE_PX = round(10 * _MAGNITUDE)
"""Shift in pixels, independent of the image size, as published."""
ROTATE_DEGREES = 30 * _MAGNITUDE


def rand_augment(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Apply two of the ten operations, drawn with replacement, each with probability 0.5.

    Args:
        image: contiguous pixels; not modified.
        rng: generator of the random choices.
    """
    for choice in rng.integers(0, len(OPERATIONS), size=_OPERATIONS_PER_IMAGE):
        applied, sign = rng.random() < _PROBABILITY, 1 if rng.random() < 0.5 else -1
        if applied:
            image = OPERATIONS[choice](image, sign)
    return image


def _unchanged(image: Pixels, sign: int) -> Pixels:
    return image


def _auto_contrast(image: Pixels, sign: int) -> Pixels:
    # As in PIL: stretch every channel from its minimum to its maximum. The published numpy
    # version negates the minimum in uint8, which wraps and drives most such channels to white.
    levels = np.arange(256)
    tables = []
    for channel in cv2.split(image):
        low, high = int(channel.min()), int(channel.max())
        scale = 255 / (high - low) if high > low else 1.0
        tables.append(levels * scale - (low * scale if high > low else 0.0))
    return _look_up(image, tables)


def _equalize(image: Pixels, sign: int) -> Pixels:
    return _look_up(image, [_equal_levels(image, channel) for channel in range(3)])


def _equal_levels(image: Pixels, channel: int) -> np.ndarray:
    counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    if step == 0:
        return np.arange(256)
    return (step // 2 + np.cumsum(counts) - counts) // step


def _look_up(image: Pixels, tables: list[np.ndarray]) -> Pixels:
    """Replace every level of channel i by tables[i][level], clipped to 0..255 and truncated."""
    return cv2.LUT(image, np.stack(tables, axis=1).clip(0, 255).astype(np.uint8)[None])


def _shear_x(image: Pixels, sign: int) -> Pixels:
    return _warp(image, [[1, sign * SHEAR, 0], [0, 1, 0]])


def _shear_y(image: Pixels, sign: int) -> Pixels:
    return _warp(image, [[1, 0, 0], [sign * SHEAR, 1, 0]])


def _translate_x(image: Pixels, sign: int) -> Pixels:
    result = np.full_like(image, _FILL)
    if sign > 0:
        result[:, :-TRANSLATE_PX] = image[:, TRANSLATE_PX:]
    else:
        result[:, TRANSLATE_PX:] = image[:, :-TRANSLATE_PX]
    return result


def _translate_y(image: Pixels, sign: int) -> Pixels:
    result = np.full_like(image, _FILL)
    if sign > 0:
        result[:-TRANSLATE_PX] = image[TRANSLATE_PX:]
    else:
        result[TRANSLATE_PX:] = image[:-TRANSLATE_PX]
    return result


def _rotate(image: Pixels, sign: int) -> Pixels:
    height, width = image.shape[:2]
    return _warp(
        image, cv2.getRotationMatrix2D((width / 2, height / 2), sign * ROTATE_DEGREES, 1.0)
    )


def _warp(image: Pixels, matrix: list[list[float]] | np.ndarray) -> Pixels:
    """Warp an image bilinearly; `matrix` maps pixels of the source to pixels of the result."""
    return cv2.warpAffine(
        image,
        np.asarray(matrix, dtype=np.float32),
        image.shape[1::-1],
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(_FILL,) * 3,
    )


OPERATIONS: tuple[Callable[[Pixels, int], Pixels], ...] = (
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
