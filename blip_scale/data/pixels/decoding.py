"""Encoded images to pixels: JPEG by simplejpeg (libjpeg-turbo), everything else by Pillow.

Both decoders give the same pixels, bit for bit. Colour profiles are ignored and, unless asked for,
EXIF orientation, as in the published code; a truncated file is corrupt.

Legend: H and W the height and width of the image.
"""

from __future__ import annotations

import io
import re

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from blip_scale.data.reading.stream_store import CorruptSample

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_FAST_COLOURS = ("YCbCr", "RGB", "Gray")  # not CMYK and YCCK: Pillow knows Adobe's inverted inks


def describe(error: Exception) -> str:
    """Kind and message of a decoder's error, the same whenever the same image fails: Pillow writes
    the address of an object in memory into some."""
    return _ADDRESS.sub("", f"{type(error).__name__}: {error}")


def decode_image(encoded: bytes, upright: bool = False) -> Image.Image:
    """RGB pixels of an encoded image, by Pillow; raises CorruptSample for what can't be decoded.

    Args:
        upright: turn it as EXIF says, as a person sees it; the published code, and training on
            shards, don't look.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # every format's decoder has its own ways to fail
        raise CorruptSample(describe(error)) from error


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that `decode_jpeg` takes; None for any other image, whole or not.

    Takes microseconds: the header alone is read.
    """
    if not encoded.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    # Pillow refuses what could be a decompression bomb.
    fast = colours in _FAST_COLOURS and width * height <= (Image.MAX_IMAGE_PIXELS or np.inf)
    return (width, height) if fast else None


def decode_jpeg(
    encoded: bytes, size: tuple[int, int], divisor: int = 1, buffer: np.ndarray | None = None
) -> np.ndarray:
    """RGB pixels, uint8 [ceil(H / divisor), ceil(W / divisor), 3], of a JPEG of `jpeg_size` `size`.

    Args:
        divisor: 1, 2, 4 or 8: how much smaller the image is decoded, in the DCT domain, which costs
            less time.
        buffer: uint8, holds the pixels if they fit, until the next image takes it: fresh memory for
            each of them costs a quarter of the time where images are large.

    Raises:
        CorruptSample: the image can't be decoded.
    """
    width, height = (-(-side // divisor) for side in size)
    if buffer is not None and buffer.size < 3 * width * height:
        buffer = None
    try:
        return simplejpeg.decode_jpeg(encoded, min_width=width, min_height=height, buffer=buffer)
    except ValueError:  # any warning of libjpeg: whether that is fatal is for Pillow to say
        return np.array(decode_image(encoded).reduce(divisor))
