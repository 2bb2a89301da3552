"""Pictures of word maps: a heat map over an image, and a sheet with one panel per word."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from blip_scale.inference.word_maps import WordMaps

_COLDEST, _HOTTEST = np.array([255.0, 200.0, 60.0]), np.array([190.0, 10.0, 40.0])
"""RGB colours of the least heat (yellow) and of the greatest heat (red)."""
_MOST_OPACITY = 0.75
"""Opacity of the colour at the greatest heat. Without heat, the image is grey."""
_SIDE = 240
"""Longer side of a panel's image in pixels."""
_LEAST_WIDTH = 120
"""Minimum width of a panel in pixels, so that a word fits below a tall image."""
_MARGIN = 12
_FONT_SIZE = 17
_LABEL_HEIGHT = 28
_COLUMNS = 4

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """Draw a map over an image, scaled to the map's maximum.

    Args:
        image: RGB, any aspect ratio. The network received it resized to a square, so the map is
            stretched over the whole image.
        heat: [rows, columns], at least 0. With a map of zeros, the image is grey.

    Returns:
        RGB image of the size of `image`.
    """
    peak = float(heat.max())
    shares = (heat / peak if peak > 0 else heat).float().numpy()
    resized = Image.fromarray(shares).resize(image.size, Image.Resampling.BICUBIC)
    smooth = np.asarray(resized).clip(0, 1)[..., None]
    colours = _COLDEST + (_HOTTEST - _COLDEST) * smooth
    grey = np.asarray(image.convert("L"))[..., None]
    pixels = grey + (colours - grey) * _MOST_OPACITY * smooth
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_sheet(image: Image.Image, result: WordMaps) -> Image.Image:
    """Draw the image with its matching probability, then one panel per word, at most four a row.

    Args:
        image: RGB, upright.
        result: maps of its caption.
    """
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    panels = [(image, f"match {result.probability:.2f}")]
    for word, heat in zip(result.words, result.maps, strict=True):
        panels.append((overlay(image, heat), word))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    panel_width = max(image.width, _LEAST_WIDTH)
    cell_width, cell_height = panel_width + _MARGIN, image.height + _LABEL_HEIGHT + _MARGIN
    size = (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for index, (panel, label) in enumerate(panels):
        left = _MARGIN + index % columns * cell_width
        top = _MARGIN + index // columns * cell_height
        sheet.paste(panel, (left, top))
        frame = (left - 1, top - 1, left + panel.width, top + panel.height)
        draw.rectangle(frame, outline="lightgrey")
        label = _shortened(label, font, panel_width)
        draw.text((left, top + image.height + 4), label, fill="black", font=font)
    return sheet


def _font() -> Font:
    """Load DejaVu, which has most alphabets, if the machine has it. Pillow's own font is ASCII."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", _FONT_SIZE)
    except OSError:
        return ImageFont.load_default(_FONT_SIZE)


def _shortened(label: str, font: Font, width: int) -> str:
    """Cut a label to `width` pixels, with an ellipsis."""
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(f"{label}...") > width:
        label = label[:-1]
    return f"{label}..."
