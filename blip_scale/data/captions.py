"""Cleaning of captions and questions as published with BLIP (`pre_caption` and `pre_question` of
the original code)."""

from __future__ import annotations

import re
from collections.abc import Callable

Clean = Callable[[str, int], str]
"""clean(text, max_words)."""

_REMOVED = re.compile(r"[.!\"()*#:;~]")
_WHITESPACE_RUN = re.compile(r"\s{2,}")


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Lower-case, drop the punctuation that BLIP drops, keep at most `max_words` words.

    Each of . ! " ( ) * # : ; ~ becomes a space, runs of white space become one space; commas,
    apostrophes, question marks, hyphens and slashes stay. The result may be empty. 30 words are
    published for pretraining and COCO/Flickr, 40 for NLVR2 and MSRVTT.
    """
    caption = _REMOVED.sub(" ", caption.lower())
    caption = _WHITESPACE_RUN.sub(" ", caption)
    caption = caption.rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def clean_question(question: str, max_words: int = 50) -> str:
    """Lower-case, delete the punctuation that BLIP drops, keep at most `max_words` words.

    Unlike in captions nothing takes the place of . ! " ( ) * # : ; ~ and runs of spaces stay.
    """
    question = _REMOVED.sub("", question.lower()).rstrip(" ")
    return " ".join(question.split(" ")[:max_words])
