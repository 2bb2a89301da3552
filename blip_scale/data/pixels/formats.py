"""Supported image formats, and the only function that opens images with Pillow."""

from __future__ import annotations

import io
import warnings

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "ICO", "JPEG2000")
"""Formats of Pillow that are decoded. Others run programs (EPS runs Ghostscript) or are rare."""
UNKNOWN_FORMAT = (
    f"not an image of a known format ({', '.join(FORMATS)}; HEIC and SVG are not supported)"
)
"""Message for an image of another format."""
IMAGE_ENDINGS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ico", "jp2",
    "heic", "heif", "jxl",
)  # fmt: skip
"""File extensions of images, in lower case. Pillow can't decode heic, heif and jxl; these files are
listed here so that they are reported as rejects."""

# `check_pixels` replaces Pillow's own limit, with a message that names the image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(encoded: bytes) -> Image.Image:
    """Open an image of one of `FORMATS` with Pillow. Only the header is read.

    Raises:
        UnidentifiedImageError: the file has another format, or is not an image.
    """
    return Image.open(io.BytesIO(encoded), formats=FORMATS)
