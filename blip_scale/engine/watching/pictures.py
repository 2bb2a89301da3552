"""A grid of images with a generated caption and the true one under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_SIDE = 224
_MARGIN = 10
_FONT_SIZE = 19
_LINE_HEIGHT = 23
_LINES = 3
_COLUMNS = 2
"""Panels per row. A TensorBoard card is about 300 pixels wide, so captions in more columns would be
too small to read."""


@dataclass(frozen=True)
class Panel:
    """An image with two texts."""

    image: Tensor
    """Pixels, uint8 [3, H, W]."""
    caption: str
    """Generated caption, drawn in black."""
    truth: str
    """Caption in the data, drawn in grey."""


def draw_grid(panels: Sequence[Panel], columns: int = _COLUMNS) -> Tensor:
    """Draw panels in rows. Each has the image, `caption` in black and `truth` in grey.

    Args:
        panels: panels to draw.
        columns: panels per row.

    Returns:
        uint8 [3, height, width].
    """
    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns)
    cell_width = _SIDE + _MARGIN
    cell_height = _SIDE + 2 * _LINES * _LINE_HEIGHT + 2 * _MARGIN
    size = (columns * cell_width + _MARGIN, max(1, rows) * cell_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = _font()
    for index, panel in enumerate(panels):
        left = _MARGIN + index % columns * cell_width
        top = _MARGIN + index // columns * cell_height
        image = Image.fromarray(panel.image.cpu().permute(1, 2, 0).contiguous().numpy())
        sheet.paste(image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), (left, top))
        draw.rectangle((left - 1, top - 1, left + _SIDE, top + _SIDE), outline="lightgrey")
        top += _SIDE + 2
        for text, colour in ((panel.caption, "black"), (panel.truth, "grey")):
            for line in _wrap(text, font):
                draw.text((left, top), line, fill=colour, font=font)
                top += _LINE_HEIGHT
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return DejaVu, which has most alphabets, or Pillow's ASCII font if DejaVu is missing."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", _FONT_SIZE)
    except OSError:
        return ImageFont.load_default(_FONT_SIZE)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Wrap a text to the image width, at most three lines. Replace the rest with an ellipsis."""
    lines: list[str] = []
    for word in text.split() or ["-"]:
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= _SIDE:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1]} ..."]
    return [_shorten(line, font) for line in lines]


def _shorten(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= _SIDE:
        return line
    while font.getlength(line + "...") > _SIDE:
        line = line[:-1]
    return line + "..."
