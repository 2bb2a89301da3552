"""Cleaning of captions and questions as published with BLIP (`pre_caption` and `pre_question` of
the original code)."""

from __future__ import annotations

import re
from collections.abc import Callable

Clean = Callable[[str, int], str]
"""clean(text, max_words)."""

_REMOVED = re.compile(r"[.!\"()*#:;~]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters, tab and newline among them, and the line separators of Unicode."""
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols that show nothing."""
_WHITESPACE_RUN = re.compile(r"\s{2,}")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f]+[\"')\]]*(?=\s)")
_KEPT_SHARE = 1 / 3
"""A sentence end that keeps less of `max_words` is none to cut at: the full stop of "Dr."."""


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Lower-case, drop the punctuation that BLIP drops, keep at most `max_words` words.

    Each of . ! " ( ) * # : ; ~ becomes a space, runs of white space become one space; commas,
    apostrophes, question marks, hyphens and slashes stay. 30 words are published for pretraining
    and COCO/Flickr, 40 for NLVR2 and MSRVTT.

    Unlike in the published code control characters and line separators become spaces too, and a
    caption of which nothing is visible (zero-width characters, fillers) becomes empty.
    """
    caption = _REMOVED.sub(" ", _CONTROLS.sub(" ", caption.lower()))
    caption = _WHITESPACE_RUN.sub(" ", caption).strip(" ")
    return " ".join(caption.split(" ")[:max_words]) if _is_visible(caption) else ""


def is_long(caption: str, max_words: int) -> bool:
    """Whether cleaning would cut the caption."""
    if len(caption) < 2 * max_words:  # so many words have more characters
        return False
    return len(clean_caption(caption, len(caption)).split(" ")) > max_words


def clean_to_a_sentence(caption: str, max_words: int = 30) -> str:
    """`clean_caption`, but a caption that is too long ends at its last sentence end that fits.

    Where no sentence end keeps a third of `max_words`, it is cut as published.
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
    """Lower-case, delete the punctuation that BLIP drops, keep at most `max_words` words.

    Unlike in captions nothing takes the place of . ! " ( ) * # : ; ~ and runs of spaces stay.
    """
    question = _REMOVED.sub("", _CONTROLS.sub(" ", question.lower())).rstrip(" ")
    return " ".join(question.split(" ")[:max_words]) if _is_visible(question) else ""


def _is_visible(text: str) -> bool:
    """Whether a text shows at least one character."""
    shown = (c.isprintable() and not c.isspace() and c not in _BLANKS for c in text)
    return any(shown)
