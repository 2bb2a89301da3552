"""Image formats that are read, and the one way in which Pillow opens an image."""

from __future__ import annotations

import io

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "ICO", "JPEG2000")
"""Formats of Pillow that are decoded. Others run programs (EPS runs Ghostscript) or are rare."""
IMAGE_ENDINGS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ico", "jp2",
    "heic", "heif", "jxl",
)  # fmt: skip
"""Endings of image files, lower case. Pillow decodes no heic, heif and jxl: such files are read and
rejected by name."""


def open_image(encoded: bytes) -> Image.Image:
    """Open an image of `FORMATS` with Pillow; only the header is read.

    Raises:
        UnidentifiedImageError: another format, or no image.
    """
    return Image.open(io.BytesIO(encoded), formats=FORMATS)
