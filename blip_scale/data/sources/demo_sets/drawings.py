"""Drawings as SVG or PNG files or characters of a font, and their rendering to JPEG on white."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from blip_scale.data.sources.demo_sets.emoji_names import CodePoints

_JPEG_QUALITY = 92
_OVERSAMPLING = 1.25  # drawings fill about 0.8 of their canvas
_MARGIN = 0.03
# The canvas is twice the height of a character, so that nothing of a wide one is cut off.
_LETTER = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 200">'
    '<text x="40" y="140" font-family="{family}" font-size="100">{text}</text></svg>'
)


@dataclass(frozen=True)
class Artwork:
    """What is rendered: a picture file, or characters of a font."""

    path: Path
    """An .svg or .png file, or a font (.ttf)."""
    text: str = ""
    """Characters to draw, for a font."""
    font_family: str = ""
    """Name inside the font."""


@dataclass(frozen=True)
class Drawing:
    """One picture of one emoji."""

    points: CodePoints
    style: str
    """Name of the set that it belongs to, e.g. `openmoji`."""
    artwork: Artwork


def render(artwork: Artwork, size: int) -> bytes:
    """JPEG (quality 92) of an artwork on white, its longer side `size` pixels.

    The empty margin of a vector drawing is cut off and the drawing centred on a square, as the
    margins differ from style to style. Raises ValueError, with the path, for an artwork that cannot
    be rendered.
    """
    try:
        if artwork.path.suffix == ".png":
            picture = _scaled(Image.open(artwork.path).convert("RGBA"), size)
        else:
            picture = _trimmed(_rasterise(artwork, size), size)
    except (ValueError, OSError) as error:
        raise ValueError(f"{artwork.path}: cannot be rendered ({error})") from error
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    encoded = io.BytesIO()
    canvas.convert("RGB").save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return encoded.getvalue()


def render_all(artworks: Iterable[Artwork], size: int) -> Iterator[bytes]:
    """Render many artworks on all cores, in the order given."""
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(partial(render, size=size), artworks, chunksize=32)


def _rasterise(artwork: Artwork, size: int) -> Image.Image:
    import resvg_py

    is_font = bool(artwork.text)
    side = 2 * size if is_font else round(size * _OVERSAMPLING)
    letter = _LETTER.format(family=artwork.font_family, text=artwork.text)
    # The default dpi of 0 fails on drawings that are measured in mm or pt.
    png = resvg_py.svg_to_bytes(
        svg_string=letter if is_font else None,
        svg_path=None if is_font else str(artwork.path),
        font_files=[str(artwork.path)] if is_font else None,
        width=side, height=side, dpi=96, skip_system_fonts=True,
    )  # fmt: skip
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _trimmed(picture: Image.Image, size: int) -> Image.Image:
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise ValueError("nothing is drawn")
    margin = round(size * _MARGIN)
    drawing = _scaled(picture.crop(box), size - 2 * margin)
    square = Image.new("RGBA", (size, size))
    square.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return square


def _scaled(picture: Image.Image, longer_side: int) -> Image.Image:
    scale = longer_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
