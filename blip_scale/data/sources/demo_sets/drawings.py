"""Render drawings in SVG or PNG files to JPEG on a white background."""

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


@dataclass(frozen=True)
class Drawing:
    """A drawing of an emoji by one source."""

    points: CodePoints
    style: str
    """Name of its source, such as `openmoji`."""
    path: Path
    """An .svg or .png file."""


def render(path: Path, size: int) -> bytes:
    """Render an .svg or .png file on white to a JPEG (quality 92) with a longer side of `size`.

    The empty margin of an SVG is cropped, and the drawing is centred on a square, because margins
    differ between styles.

    Raises:
        ValueError: the file cannot be rendered. The message names its path.
    """
    try:
        if path.suffix == ".png":
            picture = _scaled(Image.open(path).convert("RGBA"), size)
        else:
            picture = _trimmed(_rasterise(path, size), size)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be rendered ({error})") from error
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    encoded = io.BytesIO()
    canvas.convert("RGB").save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return encoded.getvalue()


def render_all(paths: Iterable[Path], size: int) -> Iterator[bytes]:
    """Render many files on all cores. The order is preserved."""
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(partial(render, size=size), paths, chunksize=32)


def _rasterise(path: Path, size: int) -> Image.Image:
    import resvg_py

    side = round(size * _OVERSAMPLING)
    # The default dpi of 0 fails for drawings with sizes in mm or pt.
    png = resvg_py.svg_to_bytes(
        svg_path=str(path), width=side, height=side, dpi=96, skip_system_fonts=True
    )
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
