"""Noto Emoji drawings (SIL OFL 1.1): the colour font from the package dynamic-font, the monochrome
one from the package manimgx-fonts."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from blip_scale.data.sources.demo_sets.drawings import Artwork, Drawing
from blip_scale.data.sources.demo_sets.emoji_names import CodePoints, is_flag, names

STYLE = "noto"
MONOCHROME = "noto-monochrome"
ATTRIBUTION = (
    "Noto Color Emoji and Noto Emoji, copyright Google LLC (https://github.com/googlefonts/"
    "noto-emoji), SIL Open Font License 1.1 (https://openfontlicense.org), from the packages "
    "dynamic-font and manimgx-fonts."
)
_LIGATURES, _EXTENSION = 4, 7  # types of GSUB lookups


def drawings() -> list[Drawing]:
    """All colour drawings, ordered by code points."""
    font = _font("dynamic-font", "dynamic_font/assets/fonts/NotoColorEmoji-Regular.ttf")
    return _drawings(STYLE, font, "Noto Color Emoji")


def monochrome() -> list[Drawing]:
    """All black drawings but flags, on which the letters of the country stand."""
    font = _font("manimgx-fonts", "manimgx_fonts/NotoEmoji[wght].ttf")
    black = _drawings(MONOCHROME, font, "Noto Emoji")
    return [drawing for drawing in black if not is_flag(drawing.points)]


def _font(package: str, file: str) -> Path:
    return Path(str(distribution(package).locate_file(file)))


def _drawings(style: str, font: Path, family: str) -> list[Drawing]:
    can_draw = _Coverage(font)
    return [
        Drawing(points, style, Artwork(font, text="".join(map(chr, points)), font_family=family))
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
