"""Noto Color Emoji drawings (SIL OFL 1.1), a font in the package dynamic-font."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from blip_scale.data.sources.demo_sets.drawings import Artwork, Drawing
from blip_scale.data.sources.demo_sets.emoji_names import CodePoints, names

STYLE = "noto"
ATTRIBUTION = (
    "Noto Color Emoji, copyright Google Inc. (https://github.com/googlefonts/noto-emoji), SIL Open "
    "Font License 1.1 (https://openfontlicense.org), from the package dynamic-font."
)
_LIGATURES, _EXTENSION = 4, 7  # types of GSUB lookups


def drawings() -> list[Drawing]:
    """All drawings of named emoji, ordered by code points."""
    package = distribution("dynamic-font")
    font = Path(str(package.locate_file("dynamic_font/assets/fonts/NotoColorEmoji-Regular.ttf")))
    can_draw = _Coverage(font)
    return [
        Drawing(points, STYLE, Artwork(font, "".join(map(chr, points)), "Noto Color Emoji"))
        for points in sorted(names())
        if points in can_draw
    ]


class _Coverage:
    """The sequences that a font has one glyph for."""

    def __init__(self, font: Path) -> None:
        from fontTools.ttLib import TTFont

        table = TTFont(font, lazy=True)
        self._glyphs: dict[int, str] = table.getBestCmap()
        self._ligatures: set[tuple[str, ...]] = set()
        for lookup in table["GSUB"].table.LookupList.Lookup:
            for subtable in lookup.SubTable:
                if subtable.LookupType == _EXTENSION:
                    subtable = subtable.ExtSubTable
                if subtable.LookupType == _LIGATURES:
                    self._add(subtable.ligatures)

    def _add(self, ligatures: dict[str, list]) -> None:
        for first, continuations in ligatures.items():
            for ligature in continuations:
                self._ligatures.add((first, *ligature.Component))

    def __contains__(self, points: CodePoints) -> bool:
        if any(point not in self._glyphs for point in points):
            return False
        return len(points) == 1 or tuple(self._glyphs[p] for p in points) in self._ligatures
