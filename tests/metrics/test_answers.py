"""VQA accuracy against examples worked by hand after the official rule."""

from __future__ import annotations

import pytest

from blip_scale.evaluation.metrics.answers import normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (
            "A red, white and blue flag",
            "red white and blue flag",
        ),  # a comma before a space is removed
        ("red,white", "red white"),  # other commas become spaces
        ("1,000", "1000"),  # a comma between digits removes all punctuation
        ("t-shirt", "t shirt"),
        ("Two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("it's", "it's"),
        ("The U.S.A.", "usa"),
        ("3.5 m.", "3.5 m"),
        ("yes!\n", "yes"),
    ],
)
def test_normalization(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # Of ten people, n gave this answer. Without one of them n - 1 remain, without another person n.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)],
)
def test_ten_people(agreeing: int, expected: float) -> None:
    others = [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_accuracy("Cat.", ["cat"] * agreeing + others) == pytest.approx(expected)


def test_people_who_agree_are_not_normalised() -> None:
    """The official code does not normalise answers on which all people agree."""
    assert vqa_accuracy("two", ["two"] * 10) == 1
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1


def test_one_truth() -> None:
    assert vqa_accuracy("The circle", ["circle"]) == 1
    assert vqa_accuracy("square", ["circle"]) == 0
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("square", [])
