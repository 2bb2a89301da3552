"""BLIP's published training transform, the baseline of the data benchmark.

Pillow decodes. torchvision crops, resizes (bicubic), flips and normalises in float32. RandAugment
(N=2, M=5) uses OpenCV. AutoContrast follows Pillow's rule, like ours (see
blip_scale/data/pixels/augment.py), and takes as long as the published one.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from blip_scale.data.pixels.transforms import IMAGE_MEAN, IMAGE_STD

Pixels = np.ndarray
"""Pixels, uint8 [height, width, 3]."""

_FILL = (128, 128, 128)
_STRENGTH = 5 / 10  # M divided by its largest value


def published_transform(size: int, min_scale: float = 0.2) -> Callable[[Image.Image], Tensor]:
    """Return a transform from an RGB image to normalised float32 [3, size, size].

    It uses the global generators of torch and NumPy.
    """
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            rand_augment,
            transforms.ToTensor(),
            transforms.Normalize(IMAGE_MEAN, IMAGE_STD),
        ]
    )


def decode(encoded: bytes) -> Image.Image:
    """Decode a JPEG to an RGB image."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def rand_augment(image: Image.Image) -> Pixels:
    """Draw two operations with replacement, and apply each with probability one half."""
    pixels = np.array(image)
    for name in np.random.choice(list(OPERATIONS), 2):
        applied, sign = np.random.random() < 0.5, 1 if np.random.random() < 0.5 else -1
        if applied:
            pixels = OPERATIONS[name](pixels, sign)
    return pixels


def auto_contrast(pixels: Pixels, sign: int) -> Pixels:
    """Stretch each channel to the full range."""

    def stretched(channel: Pixels) -> Pixels:
        low, high = int(channel.min()), int(channel.max())
        if high <= low:
            return channel
        scale = 255 / (high - low)
        return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)[channel]

    return cv2.merge([stretched(channel) for channel in cv2.split(pixels)])


def equalize(pixels: Pixels, sign: int) -> Pixels:
    """Equalise the histogram of each channel."""

    def equalized(channel: Pixels) -> Pixels:
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step == 0:
            return channel
        table = (np.cumsum(counts) - counts + step // 2) // step
        return table.clip(0, 255).astype(np.uint8)[channel]

    return cv2.merge([equalized(channel) for channel in cv2.split(pixels)])


def brightness(pixels: Pixels, sign: int) -> Pixels:
    """Scale all values by 1, like the published code, which does this work too."""
    factor = 0.1 + 1.8 * _STRENGTH
    return (np.arange(256) * factor).clip(0, 255).astype(np.uint8)[pixels]


def sharpness(pixels: Pixels, sign: int) -> Pixels:
    """Filter the image and discard the result, because the factor is 1, like the published code."""
    kernel = np.ones((3, 3), dtype=np.float32)
    kernel[1, 1] = 5
    cv2.filter2D(pixels, -1, kernel / 13)
    return pixels


def shear_x(pixels: Pixels, sign: int) -> Pixels:
    """Shear along the x axis."""
    return _warp(pixels, [[1, 0.3 * _STRENGTH * sign, 0], [0, 1, 0]])


def shear_y(pixels: Pixels, sign: int) -> Pixels:
    """Shear along the y axis."""
    return _warp(pixels, [[1, 0, 0], [0.3 * _STRENGTH * sign, 1, 0]])


def translate_x(pixels: Pixels, sign: int) -> Pixels:
    """Shift along the x axis."""
    return _warp(pixels, [[1, 0, -10 * _STRENGTH * sign], [0, 1, 0]])


def translate_y(pixels: Pixels, sign: int) -> Pixels:
    """Shift along the y axis."""
    return _warp(pixels, [[1, 0, 0], [0, 1, -10 * _STRENGTH * sign]])


def rotate(pixels: Pixels, sign: int) -> Pixels:
    """Rotate around the centre."""
    height, width = pixels.shape[:2]
    return _warp(
        pixels, cv2.getRotationMatrix2D((width / 2, height / 2), 30 * _STRENGTH * sign, 1.0)
    )


def _warp(pixels: Pixels, matrix: list[list[float]] | np.ndarray) -> Pixels:
    """Apply an affine map. `matrix` maps pixels of the source to those of the result."""
    height, width = pixels.shape[:2]
    return cv2.warpAffine(
        pixels,
        np.asarray(matrix, dtype=np.float32),
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=_FILL,
    )


OPERATIONS: dict[str, Callable[[Pixels, int], Pixels]] = {
    "identity": lambda pixels, sign: pixels,
    "auto_contrast": auto_contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "equalize": equalize,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}
