"""The published image transforms, on PIL images and with a random generator that the caller owns.

Results are uint8 [3, H, W]; normalisation with IMAGE_MEAN and IMAGE_STD is done on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_FILL = (128, 128, 128)
_ASPECT_RANGE = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
_OPERATIONS_PER_IMAGE = 2  # RandAugment's N
_MAGNITUDE = 5 / 10  # RandAugment's M of 10
_PROBABILITY = 0.5

ENHANCE_FACTOR = 0.1 + 1.8 * _MAGNITUDE
"""1.0: at M=5 the published brightness and sharpness change nothing."""
SHEAR = 0.3 * _MAGNITUDE
TRANSLATE_PX = 10 * _MAGNITUDE
"""Pixels whatever the image size, as published."""
ROTATE_DEGREES = 30 * _MAGNITUDE


@dataclass(frozen=True)
class EvalTransform:
    """Resize to a square, whatever the aspect ratio, bicubic."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        return to_tensor(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class TrainTransform:
    """RandomResizedCrop (bicubic), horizontal flip with probability 0.5, RandAugment."""

    size: int
    min_scale: float = 0.2
    flip: bool = True
    augment: bool = True

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        image = image.crop(random_crop_box(image.size, self.min_scale, rng))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if self.augment:
            image = rand_augment(image, rng)
        return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def random_crop_box(
    size: tuple[int, int], min_scale: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of area min_scale to 1 and aspect 3/4 to 4/3, as torchvision
    draws.

    Where ten draws don't fit into the image, the largest centred box of an allowed aspect.
    """
    width, height = size
    low, high = (math.log(aspect) for aspect in _ASPECT_RANGE)
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_scale, 1.0)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(rng.integers(0, room + 1)) for room in (width - w, height - h))
            return left, top, left + w, top + h
    aspect = min(max(width / height, _ASPECT_RANGE[0]), _ASPECT_RANGE[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two of the ten operations, drawn with replacement, each applied with probability 0.5."""
    for choice in rng.integers(0, len(OPERATIONS), size=_OPERATIONS_PER_IMAGE):
        applied, sign = rng.random() < _PROBABILITY, 1 if rng.random() < 0.5 else -1
        if applied:
            image = OPERATIONS[choice](image, sign)
    return image


def _identity(image: Image.Image, sign: int) -> Image.Image:
    return image


def _auto_contrast(image: Image.Image, sign: int) -> Image.Image:
    # PIL's meaning: stretch every channel from its minimum to its maximum. The published numpy
    # version negates the minimum in uint8, which wraps and drives most such channels to white.
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, sign: int) -> Image.Image:
    return ImageOps.equalize(image)


def _brightness(image: Image.Image, sign: int) -> Image.Image:
    return (
        image if ENHANCE_FACTOR == 1.0 else ImageEnhance.Brightness(image).enhance(ENHANCE_FACTOR)
    )


def _sharpness(image: Image.Image, sign: int) -> Image.Image:
    return image if ENHANCE_FACTOR == 1.0 else ImageEnhance.Sharpness(image).enhance(ENHANCE_FACTOR)


def _shear_x(image: Image.Image, sign: int) -> Image.Image:
    return _warp(image, (1.0, -sign * SHEAR, 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Image.Image, sign: int) -> Image.Image:
    return _warp(image, (1.0, 0.0, 0.0, -sign * SHEAR, 1.0, 0.0))


def _translate_x(image: Image.Image, sign: int) -> Image.Image:
    return _warp(image, (1.0, 0.0, sign * TRANSLATE_PX, 0.0, 1.0, 0.0))


def _translate_y(image: Image.Image, sign: int) -> Image.Image:
    return _warp(image, (1.0, 0.0, 0.0, 0.0, 1.0, sign * TRANSLATE_PX))


def _rotate(image: Image.Image, sign: int) -> Image.Image:
    angle = math.radians(sign * ROTATE_DEGREES)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _warp(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _warp(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Bilinear affine warp; `matrix` maps pixels of the result to those of the source."""
    a, b, c, d, e, f = matrix
    # PIL puts pixel centres at halves, the published (OpenCV) warp at whole numbers.
    c, f = c + 0.5 - (a + b) / 2, f + 0.5 - (d + e) / 2
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        resample=Image.Resampling.BILINEAR,
        fillcolor=_FILL,
    )


OPERATIONS: tuple[Callable[[Image.Image, int], Image.Image], ...] = (
    _identity,
    _auto_contrast,
    _brightness,
    _sharpness,
    _equalize,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _rotate,
)
