"""Build self-contained HTML pages with embedded images, to inspect data. They have no scripts.

Ids, captions and images are untrusted. Texts are escaped, and images are decoded and re-encoded.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.reading.stream_store import CorruptSample

SIDE = 224
"""Longer side of an image on a page, in pixels."""
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
  color: #1c2024; background: #f6f7f8; }
table { border-collapse: collapse; margin: 1em 0; background: #fff; }
td, th { padding: .35em .9em; border: 1px solid #d9dde1; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1em; }
.card { background: #fff; border: 1px solid #d9dde1; border-radius: 6px; padding: .8em; }
.card img { display: block; margin: 0 auto .6em; max-width: 100%; }
.card small { color: #7a848e; word-break: break-all; }
.text { margin: .35em 0; padding-left: .6em; border-left: 4px solid #3f8f5b; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """Build a page.

    Args:
        title: text of the title and the heading.
        body: HTML below the heading.
        style: CSS added after the common style.
    """
    heading = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f"<style>{_STYLE}{style}</style></head><body>\n<h1>{heading}</h1>\n{body}\n</body></html>\n"
    )


def cards(items: Sequence[str]) -> str:
    """Arrange cards in a grid that adapts to the width of the window."""
    return f'<div class="cards">\n{"".join(items)}</div>'


def card(image: bytes, texts: str, name: str) -> str:
    """Build a card: an image with texts below it.

    Args:
        image: encoded image; if it can't be decoded, the card says so.
        texts: HTML, already escaped.
        name: plain text in small print.
    """
    return f'<div class="card">{_picture(image)}{texts}<small>{html.escape(name)}</small></div>\n'


def thumbnail(image: bytes) -> Image.Image:
    """Decode an image and reduce it to at most `SIDE` pixels per side.

    Raises:
        CorruptSample: the image can't be decoded.
    """
    picture = decode_image(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    return picture


def _picture(image: bytes) -> str:
    try:
        picture = thumbnail(image)
    except CorruptSample:
        return "<p>(can't be decoded)</p>"
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=85)
    data = base64.b64encode(encoded.getvalue()).decode()
    return f'<img alt="" width="{picture.width}" src="data:image/jpeg;base64,{data}">'
