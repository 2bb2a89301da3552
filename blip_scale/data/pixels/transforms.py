"""BLIP's image transforms, with an explicit random generator.

Results are uint8 [3, H, W]. `normalize_images` is applied later, on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from blip_scale.config.recipe import MAX_PIXELS
from blip_scale.data.pixels.augment import rand_augment
from blip_scale.data.pixels.decoding import (
    check_pixels,
    decode_image,
    decode_jpeg,
    jpeg_size,
)

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_ASPECT_RANGE = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
_DIVISORS = (8, 4, 2)  # libjpeg-turbo is fast at these; others are slower than full size
_BUFFER_BYTES = 3 << 22  # holds a decoded image of up to 4 megapixels

Box = tuple[int, int, int, int]
"""Tuple (left, top, right, bottom) in pixels."""


@dataclass(frozen=True)
class EvalTransform:
    """Bicubic resize to a square, whatever the aspect ratio."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize an RGB image, and convert it to uint8 [3, size, size]."""
        return to_tensor(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class TrainTransform:
    """Decode a training image, then RandomResizedCrop (bicubic), horizontal flip and RandAugment.

    `path` selects the implementation. All of them draw the same random numbers.
    """

    size: int
    min_scale: float = 0.2
    flip: bool = True
    augment: bool = True
    path: Literal["fast", "exact", "published"] = "exact"
    """See DataRecipe.transform."""
    max_pixels: int = MAX_PIXELS
    """See DataRecipe.max_pixels."""
    _buffer: np.ndarray = field(
        default_factory=lambda: np.empty(_BUFFER_BYTES, np.uint8), repr=False, compare=False
    )

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> Tensor:
        """Transform an encoded image to contiguous uint8 [3, size, size].

        Raises:
            CorruptSample: the image can't be decoded, or is too large.
        """
        crop = self._published_crop if self.path == "published" else self._fast_crop
        pixels = crop(encoded, rng)
        if self.flip and rng.random() < 0.5:
            pixels = cv2.flip(pixels, 1)
        if self.augment:
            pixels = rand_augment(pixels, rng)
        planes = np.empty((3, self.size, self.size), np.uint8)
        cv2.split(pixels, list(planes))  # takes 0.01 ms; transposing with NumPy takes 0.08 ms
        return torch.from_numpy(planes)

    def _published_crop(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        image = decode_image(encoded, max_pixels=self.max_pixels)
        image = image.crop(random_crop_box(image.size, self.min_scale, rng))
        return np.array(image.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def _fast_crop(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        size = jpeg_size(encoded)
        if size is None:
            image = decode_image(encoded, max_pixels=self.max_pixels)
            box = random_crop_box(image.size, self.min_scale, rng)
            pixels = np.asarray(image.crop(box))
        else:
            check_pixels(size, self.max_pixels)
            box = random_crop_box(size, self.min_scale, rng)
            divisor = self._divisor(box)
            left, top, right, bottom = (round(side / divisor) for side in box)
            pixels = decode_jpeg(encoded, size, divisor, self._buffer)[top:bottom, left:right]
        # With a contiguous array and the batch axis, torch detects the channels-last layout and
        # uses its fast kernel (0.19 ms instead of 0.27).
        batch = torch.from_numpy(np.array(pixels[None], order="C")).permute(0, 3, 1, 2)
        resized = F.interpolate(batch, (self.size, self.size), mode="bicubic", antialias=True)
        return resized[0].permute(1, 2, 0).numpy()

    def _divisor(self, box: Box) -> int:
        """Largest reduction of the JPEG at which the crop is still as large as the result."""
        side = min(box[2] - box[0], box[3] - box[1])
        fits = (d for d in _DIVISORS if side >= d * (self.size + 1))  # + 1: the box is rounded
        return next(fits, 1) if self.path == "fast" else 1


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a uint8 tensor [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def random_crop_box(size: tuple[int, int], min_scale: float, rng: np.random.Generator) -> Box:
    """Draw a crop with a relative area from min_scale to 1 and aspect 3/4 to 4/3, like torchvision.

    If ten draws do not fit into the image, return the largest centred box of an allowed aspect.
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


def normalize_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalize uint8 pixels [B, 3, H, W] by CLIP's mean and standard deviation, as published."""
    mean, deviation = _statistics(images.device)
    return ((images.float() - mean) / deviation).to(dtype)


@lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixels, [3, 1, 1], on a device.

    They are cached, because copying them to a GPU synchronises with it.
    """
    with torch.inference_mode(False):
        mean = torch.tensor(IMAGE_MEAN, device=device).view(3, 1, 1) * 255
        deviation = torch.tensor(IMAGE_STD, device=device).view(3, 1, 1) * 255
    return mean, deviation
