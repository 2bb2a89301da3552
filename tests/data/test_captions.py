"""The published caption cleaning."""

from __future__ import annotations

import pytest

from blip_scale.data.captions import clean_caption


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Dog, running!", "a dog, running"),
        ("flag: France", "flag france"),
        ('he said: "no" (twice)...', "he said no twice"),
        ("it's a t-shirt/top, isn't it?", "it's a t-shirt/top, isn't it?"),
        ("a*b#c~d;e", "a b c d e"),
        ("two  spaces \t and tabs\n", "two spaces and tabs"),
        ("one\ttab and one\nline", "one tab and one line"),
        ("a\u2028line\x1b[2J\x00", "a line [2j"),
        ("\u200b\u200d \ufeff", ""),
        ("\u2800\u3164", ""),
        ("a\u200db", "a\u200db"),
        ("  edges  ", "edges"),
        ("...", ""),
        ("", ""),
        ("ÄPFEL", "äpfel"),
    ],
)
def test_cleaning(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def test_long_captions_are_cut() -> None:
    words = [f"w{i}" for i in range(60)]
    assert clean_caption(" ".join(words)).split() == words[:30]
    assert clean_caption(" ".join(words), max_words=40).split() == words[:40]
