"""VQA accuracy by the official rule (Antol et al. 2015; https://visualqa.org/evaluation.html)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the official code passes a regex flag as the count
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_SPELLED_RIGHT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've she'd've we'd've
"""


def _contractions() -> dict[str, str]:
    """Map words that lack one apostrophe to the correct word."""
    table = {}
    for word in _SPELLED_RIGHT.split():
        for match in re.finditer("'", word):
            table[word[: match.start()] + word[match.end() :]] = word
    return table | {"somebody'd": "somebodyd"}  # as in the official table


_CONTRACTIONS = _contractions()


def normalize_answer(answer: str) -> str:
    """Normalise punctuation, articles, numbers and contractions by the official rule."""
    return _words(_without_punctuation(_one_line(answer)))


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Average min(1, number of other people with this answer / 3) over all people.

    If all people agree, nothing is normalised, as in the official code. If there is one truth
    instead of ten, the accuracy is 1 if the normalised answers are equal, else 0.

    Raises:
        ValueError: there is no truth.
    """
    if not truths:
        raise ValueError("VQA accuracy: a question without answers")
    if len(truths) == 1:
        return float(normalize_answer(answer) == normalize_answer(truths[0]))
    answer, truths = _one_line(answer), [_one_line(truth) for truth in truths]
    if len(set(truths)) > 1:
        truths = [normalize_answer(truth) for truth in truths]
        answer = normalize_answer(answer)
    same = [truth == answer for truth in truths]
    return sum(min(1.0, (sum(same) - agrees) / 3) for agrees in same) / len(truths)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    result = text
    joined = _COMMA_IN_NUMBER.search(text) is not None
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if beside_space or joined else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED)


def _words(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
