"""Roles of captions, and caption cleaning as in BLIP's code (`pre_caption` and `pre_question`).

A role names the kind of a caption, such as `alt` or `re_caption`. A caption without a role has the
role `caption`, for example in a set that was converted without `--caption-key`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Clean = Callable[[str, int], str]
"""Function clean(text, max_words) that returns the cleaned text."""

DEFAULT_ROLE = "caption"
"""Role of captions for which the source has no role."""


class RoleText(NamedTuple):
    """Uncleaned caption from the source, and its role."""

    role: str
    text: Any


def parse_roles(keys: str) -> list[tuple[str, str]]:
    """Parse `KEY,ROLE=KEY,...` into pairs of role and key.

    If a role is missing, the key is used as the role. Some sets end the keys of lists with `[]`,
    which is removed.

    Raises:
        ValueError: a role or a key is empty.
    """
    pairs = []
    for part in keys.split(","):
        role, _, key = part.strip().rpartition("=")
        key = key.strip().removesuffix("[]")
        role = role.strip() or key
        if not key or not role or part.strip().startswith("="):
            raise ValueError(f"--caption-key {keys}: expected KEY or ROLE=KEY between the commas")
        pairs.append((role, key))
    return pairs


_REMOVED = re.compile(r"[.!\"()*#:;~]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters, including tab and newline, and Unicode's line separators."""
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols without a visible glyph."""
_WHITESPACE_RUN = re.compile(r"\s{2,}")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f]+[\"')\]]*(?=\s)")
_ABBREVIATIONS = ("dr", "e.g", "i.e", "jr", "mr", "mrs", "ms", "no", "prof", "sr", "st", "vs")
"""Abbreviations whose full stop does not end a sentence."""
_KEPT_SHARE = 1 / 3
"""A sentence end is used only if at least this share of `max_words` lies before it."""


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Lower-case a caption, drop punctuation as BLIP does, and keep at most `max_words` words.

    Each of . ! " ( ) * # : ; ~ becomes a space, and runs of white space become one space. Commas,
    apostrophes, question marks, hyphens and slashes stay. BLIP uses 30 words for pretraining and
    COCO/Flickr, and 40 for NLVR2 and MSRVTT.

    Unlike in the published code, control characters and line separators become spaces too. A
    caption without visible characters (zero-width characters, fillers) becomes empty.
    """
    caption = _REMOVED.sub(" ", _CONTROLS.sub(" ", caption.lower()))
    caption = _WHITESPACE_RUN.sub(" ", caption).strip(" ")
    return " ".join(caption.split(" ")[:max_words]) if _is_visible(caption) else ""


def is_long(caption: str, max_words: int) -> bool:
    """Return True if cleaning would truncate the caption."""
    if len(caption) < 2 * max_words:  # too few characters for that many words
        return False
    return len(clean_caption(caption, len(caption)).split(" ")) > max_words


def clean_to_a_sentence(caption: str, max_words: int = 30) -> str:
    """Clean a caption like `clean_caption`, but truncate it at the end of a sentence.

    The last sentence end within `max_words` is used. If fewer than a third of `max_words` would
    remain, the caption is truncated like in `clean_caption`.
    """
    if is_long(caption, max_words):
        kept = ""
        for end in _SENTENCE_END.finditer(caption):
            cleaned = clean_caption(caption[: end.start()], max_words + 1)
            count = len(cleaned.split(" "))
            if count > max_words:
                break
            kept = cleaned if count >= _KEPT_SHARE * max_words else ""
        if kept:
            return kept
    return clean_caption(caption, max_words)


def plain(caption: str) -> str:
    """Return a caption on one line, without control characters but with its punctuation.

    If `clean_caption` would return an empty text, so does this function.
    """
    return " ".join(_CONTROLS.sub(" ", caption).split()) if clean_caption(caption, 1) else ""


def whole_sentences(caption: str, fits: Callable[[str], bool]) -> str:
    """Clean the longest prefix of whole sentences that `fits` accepts.

    Args:
        caption: the uncleaned caption, because cleaning removes the ends of sentences.
        fits: returns True if a cleaned text is short enough.

    Returns:
        The cleaned sentences, or "" if not even the first one fits.
    """
    whole = clean_caption(caption, len(caption) + 1)
    if fits(whole):
        return whole
    kept = ""
    for end in _sentence_ends(caption):
        cleaned = clean_caption(caption[:end], len(caption) + 1)
        if not fits(cleaned):
            break
        kept = cleaned
    return kept


def _sentence_ends(caption: str) -> list[int]:
    """Return the indices at which sentences end, except after abbreviations ("Dr.") or initials."""
    ends = []
    for end in _SENTENCE_END.finditer(caption):
        word = caption[: end.start()].rpartition(" ")[2].lower()
        is_abbreviation = word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha())
        if not (is_abbreviation and end[0] == "."):
            ends.append(end.end())
    return ends


def clean_question(question: str, max_words: int = 50) -> str:
    """Lower-case a question, delete punctuation as BLIP does, and keep at most `max_words` words.

    Unlike in `clean_caption`, . ! " ( ) * # : ; ~ are deleted instead of replaced by spaces, and
    runs of spaces stay.
    """
    question = _REMOVED.sub("", _CONTROLS.sub(" ", question.lower())).rstrip(" ")
    return " ".join(question.split(" ")[:max_words]) if _is_visible(question) else ""


def _is_visible(text: str) -> bool:
    """Return True if a text has at least one visible character."""
    shown = (c.isprintable() and not c.isspace() and c not in _BLANKS for c in text)
    return any(shown)
