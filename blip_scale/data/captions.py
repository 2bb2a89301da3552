"""Clean captions and questions as published (`pre_caption` and `pre_question` of BLIP's code)."""

from __future__ import annotations

import re
from collections.abc import Callable

Clean = Callable[[str, int], str]
"""Function clean(text, max_words) that returns the cleaned text."""

_REMOVED = re.compile(r"[.!\"()*#:;~]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters, including tab and newline, and Unicode's line separators."""
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols without a visible glyph."""
_WHITESPACE_RUN = re.compile(r"\s{2,}")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f]+[\"')\]]*(?=\s)")
_KEPT_SHARE = 1 / 3
"""Smallest share of `max_words` before a sentence end; the full stop of "Dr." keeps less."""


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
    """Clean a caption like `clean_caption`, but truncate a long one at the end of a sentence.

    The last sentence end that fits is used. If none keeps a third of `max_words`, the caption is
    truncated as published.
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


def clean_question(question: str, max_words: int = 50) -> str:
    """Lower-case a question, delete punctuation as BLIP does, and keep at most `max_words` words.

    Unlike in captions, . ! " ( ) * # : ; ~ are not replaced by spaces, and runs of spaces stay.
    """
    question = _REMOVED.sub("", _CONTROLS.sub(" ", question.lower())).rstrip(" ")
    return " ".join(question.split(" ")[:max_words]) if _is_visible(question) else ""


def _is_visible(text: str) -> bool:
    """Return True if a text has at least one visible character."""
    shown = (c.isprintable() and not c.isspace() and c not in _BLANKS for c in text)
    return any(shown)
