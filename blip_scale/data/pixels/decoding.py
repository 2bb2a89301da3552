"""Decode images: JPEG with simplejpeg (libjpeg-turbo), everything else with Pillow.

Both decoders give bit-identical pixels. Colour profiles are ignored, as in the published code, and
so is EXIF orientation unless requested. A truncated file counts as corrupt. Transparent pixels
become white; the published code drops the alpha channel and shows the hidden colours.

Legend: H and W the height and width of the image.
"""

from __future__ import annotations

import math
import re

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from blip_scale.config.recipe import MAX_PIXELS
from blip_scale.data.pixels.formats import UNKNOWN_FORMAT, open_image
from blip_scale.data.reading.stream_store import CorruptSample

_WHITE = 255
_MAX_16_BITS = 2**16 - 1
_MAX_32_BITS = 2**31 - 1
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_FAST_COLOURS = ("YCbCr", "RGB", "Gray")  # Pillow decodes CMYK and YCCK, with Adobe's inverted inks


def describe(error: Exception) -> str:
    """Describe a decoder's error, with the same text each time.

    Some messages of Pillow contain addresses of objects, which are removed.
    """
    return _ADDRESS.sub("", f"{type(error).__name__}: {error}")


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a too large image by the size in its header, before it is decoded.

    Raises:
        CorruptSample: the image has more than `max_pixels` pixels.
    """
    if size[0] * size[1] > max_pixels:
        raise CorruptSample(f"{size[0]}x{size[1]} pixels, more than max_pixels ({max_pixels})")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB on a white background.

    Transparent pixels become white, like in img2dataset. Integers with more than 8 bits are scaled
    by the range of their type; 32-bit integers that fit into 16 bits are treated as 16-bit.
    Floating-point pixels may be in the range 0 to 1 or 0 to 255.

    Raises:
        CorruptSample: floating-point pixels are outside both ranges or not finite.
    """
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, dtype=np.float32) / _MAX_16_BITS)
    if image.mode == "I":
        values = np.asarray(image, dtype=np.float64)
        # Pillow opens some 16-bit files (PGM) in this mode. Scaled as 32-bit, they would be black.
        return _grey(values / (_MAX_16_BITS if values.max() <= _MAX_16_BITS else _MAX_32_BITS))
    if image.mode == "F":
        return _grey(_shares(np.asarray(image)))
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        alpha = layered.getchannel("A")
        if np.asarray(alpha).min() < _WHITE:
            paper = Image.new("RGB", image.size, "white")
            paper.paste(layered, mask=alpha)
            return paper
    return image.convert("RGB")


def decode_image(
    encoded: bytes, upright: bool = False, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image to RGB with Pillow.

    Args:
        encoded: the image file.
        upright: apply the EXIF orientation. The published code and training ignore EXIF.
        max_pixels: maximum number of pixels, according to the header.

    Raises:
        CorruptSample: the image can't be decoded, or is too large.
    """
    try:
        with open_image(encoded) as image:
            check_pixels(image.size, max_pixels)
            return to_rgb(ImageOps.exif_transpose(image) if upright else image)
    except (MemoryError, CorruptSample):
        raise
    except UnidentifiedImageError as error:
        raise CorruptSample(UNKNOWN_FORMAT) from error
    except Image.DecompressionBombError as error:
        raise CorruptSample(f"more than max_pixels ({max_pixels}) pixels") from error
    except Exception as error:  # every format's decoder has its own ways to fail
        raise CorruptSample(describe(error)) from error


def _shares(values: np.ndarray) -> np.ndarray:
    """Scale floating-point pixels to the range 0 (black) to 1 (white)."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or high > _WHITE:
        raise CorruptSample(
            f"floating-point pixels from {low:g} to {high:g}, not 0 to 1 or 0 to 255"
        )
    return values if high <= 1 else values / _WHITE


def _grey(shares: np.ndarray) -> Image.Image:
    """Build a grey image from values [H, W] between 0 (black) and 1 (white)."""
    values = np.clip(np.rint(shares * _WHITE), 0, _WHITE).astype(np.uint8)
    return Image.fromarray(values).convert("RGB")


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that `decode_jpeg` supports; None for any other image.

    Only the header is read, which takes microseconds.
    """
    if not encoded.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    # Pillow refuses decompression bombs, so it gets images of this size.
    fast = colours in _FAST_COLOURS and width * height <= (Image.MAX_IMAGE_PIXELS or np.inf)
    return (width, height) if fast else None


def decode_jpeg(
    encoded: bytes, size: tuple[int, int], divisor: int = 1, buffer: np.ndarray | None = None
) -> np.ndarray:
    """Decode a JPEG to uint8 RGB pixels [ceil(H / divisor), ceil(W / divisor), 3].

    Args:
        encoded: the JPEG file.
        size: its size from `jpeg_size`.
        divisor: 1, 2, 4 or 8; the image is reduced by this factor in the DCT domain, which is
            faster.
        buffer: uint8 memory for the pixels, used if they fit. The next image overwrites them.
            Allocating memory for each image takes a quarter of the time for large images.

    Raises:
        CorruptSample: the image can't be decoded.
    """
    width, height = (-(-side // divisor) for side in size)
    if buffer is not None and buffer.size < 3 * width * height:
        buffer = None
    try:
        return simplejpeg.decode_jpeg(encoded, min_width=width, min_height=height, buffer=buffer)
    except ValueError:  # raised on any warning of libjpeg; Pillow decides whether it is fatal
        return np.array(
            decode_image(encoded, max_pixels=width * height * divisor**2).reduce(divisor)
        )
