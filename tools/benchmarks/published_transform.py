"""BLIP's published training transform, to measure ours against: Pillow decodes, torchvision crops,
resizes (bicubic), flips and normalises in float32, RandAugment (N=2, M=5) works with OpenCV.

AutoContrast has Pillow's meaning here, as ours has (see blip_scale/data/pixels/augment.py); the
time is the same.
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
"""uint8 [height, width, 3]."""

_FILL = (128, 128, 128)
_STRENGTH = 5 / 10  # M of its largest value


def published_transform(size: int, min_scale: float = 0.2) -> Callable[[Image.Image], Tensor]:
    """RGB image -> normalised float32 [3, size, size]; draws from torch's and numpy's global
    generators.
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
    """RGB image."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def rand_augment(image: Image.Image) -> Pixels:
    """Two operations, drawn with replacement, each applied with probability one half."""
    pixels = np.array(image)
    for name in np.random.choice(list(OPERATIONS), 2):
        applied, sign = np.random.random() < 0.5, 1 if np.random.random() < 0.5 else -1
        if applied:
            pixels = OPERATIONS[name](pixels, sign)
    return pixels


def auto_contrast(pixels: Pixels, sign: int) -> Pixels:
    def stretched(channel: Pixels) -> Pixels:
        low, high = int(channel.min()), int(channel.max())
        if high <= low:
            return channel
        scale = 255 / (high - low)
        return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)[channel]

    return cv2.merge([stretched(channel) for channel in cv2.split(pixels)])


def equalize(pixels: Pixels, sign: int) -> Pixels:
    def equalized(channel: Pixels) -> Pixels:
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step == 0:
            return channel
        table = (np.cumsum(counts) - counts + step // 2) // step
        return table.clip(0, 255).astype(np.uint8)[channel]

    return cv2.merge([equalized(channel) for channel in cv2.split(pixels)])


def brightness(pixels: Pixels, sign: int) -> Pixels:
    factor = 0.1 + 1.8 * _STRENGTH  # 1: the published code looks every pixel up all the same
    return (np.arange(256) * factor).clip(0, 255).astype(np.uint8)[pixels]


def sharpness(pixels: Pixels, sign: int) -> Pixels:
    kernel = np.ones((3, 3), dtype=np.float32)
    kernel[1, 1] = 5
    cv2.filter2D(pixels, -1, kernel / 13)  # at factor 1 the published code throws it away
    return pixels


def shear_x(pixels: Pixels, sign: int) -> Pixels:
    return _warp(pixels, [[1, 0.3 * _STRENGTH * sign, 0], [0, 1, 0]])


def shear_y(pixels: Pixels, sign: int) -> Pixels:
    return _warp(pixels, [[1, 0, 0], [0.3 * _STRENGTH * sign, 1, 0]])


def translate_x(pixels: Pixels, sign: int) -> Pixels:
    return _warp(pixels, [[1, 0, -10 * _STRENGTH * sign], [0, 1, 0]])


def translate_y(pixels: Pixels, sign: int) -> Pixels:
    return _warp(pixels, [[1, 0, 0], [0, 1, -10 * _STRENGTH * sign]])


def rotate(pixels: Pixels, sign: int) -> Pixels:
    height, width = pixels.shape[:2]
    return _warp(
        pixels, cv2.getRotationMatrix2D((width / 2, height / 2), 30 * _STRENGTH * sign, 1.0)
    )


def _warp(pixels: Pixels, matrix: list[list[float]] | np.ndarray) -> Pixels:
    """`matrix` maps pixels of the source to those of the result."""
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
