"""Caption metrics against worked examples of the papers, and CIDEr against its definition."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import pytest

from blip_scale.evaluation.metrics.captions import BY_CHARACTER, caption_scores

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="without Java")

GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the"
GUIDE_REFERENCES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the "
    "command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]


@pytest.fixture
def plain_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Score without Java, whose start takes longer than these tests."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("plain_words")
@pytest.mark.parametrize(
    ("candidate", "references", "bleu_1", "bleu_2"),
    [
        # Papineni et al. 2002: modified precisions 17/18 and 10/17, and 2/7 (bigrams: 0/6).
        (f"{GUIDE} party", GUIDE_REFERENCES, 17 / 18, math.sqrt(17 / 18 * 10 / 17)),
        (
            "the the the the the the the",
            ["The cat is on the mat.", "There is a cat on the mat."],
            2 / 7,
            0.0,
        ),
    ],
)
def test_bleu_as_papineni_counts_it(
    candidate: str, references: list[str], bleu_1: float, bleu_2: float
) -> None:
    scores = caption_scores([candidate], [references], ["bleu_1", "bleu_2"]).values
    assert scores["bleu_1"] == pytest.approx(bleu_1, abs=1e-6)
    assert scores["bleu_2"] == pytest.approx(bleu_2, abs=1e-6)


@pytest.mark.usefixtures("plain_words")
@pytest.mark.parametrize(
    ("candidate", "rouge_l"), [("police kill the gunman", 0.75), ("the gunman kill police", 0.5)]
)
def test_rouge_as_lin_counts_it(candidate: str, rouge_l: float) -> None:
    """Expected values are from Lin 2004, section 3. Both sides have four words."""
    scores = caption_scores([candidate], [["police killed the gunman"]], ["rouge_l"]).values
    assert scores["rouge_l"] == pytest.approx(rouge_l)


def n_grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(candidates: list[str], references: list[list[str]]) -> float:
    """Compute CIDEr-D after Vedantam et al. 2015, equations 2 to 5, with length penalty and
    clipping."""
    total = 0.0
    for candidate, truths in zip(candidates, references, strict=True):
        for n in range(1, 5):

            def weights(text: str, n: int = n) -> dict[tuple[str, ...], float]:
                result = {}
                for gram, count in n_grams(text, n).items():
                    images = sum(any(gram in n_grams(r, n) for r in refs) for refs in references)
                    result[gram] = count * math.log(len(references) / max(1, images))
                return result

            left = weights(candidate)
            for reference in truths:
                right = weights(reference)
                dot = sum(min(left[g], right[g]) * right[g] for g in left.keys() & right.keys())
                norms = [math.sqrt(sum(w * w for w in side.values())) for side in (left, right)]
                gap = len(candidate.split()) - len(reference.split())
                cosine = dot / (norms[0] * norms[1]) if all(norms) else 0.0
                total += 10 * cosine * math.exp(-(gap**2) / (2 * 6**2)) / (4 * len(truths))
    return total / len(candidates)


@pytest.mark.usefixtures("plain_words")
def test_cider_against_its_definition() -> None:
    candidates = [
        "a red bus on a street",
        "two dogs run over green grass",
        "a man rides a wave on a surfboard",
        "a plate of food",
    ]
    references = [
        ["a red bus drives down a street", "a bus on a city street"],
        ["two dogs play on the grass", "a dog chases a dog over green grass in a park"],
        ["a man on a surfboard rides a wave"],
        ["a cat sleeps on a bed", "a plate of food with rice", "a plate of food"],
    ]
    scores = caption_scores(candidates, references, ["cider"]).values["cider"]
    assert scores == pytest.approx(cider_d(candidates, references), rel=1e-6)
    assert scores > 1


@needs_java  # METEOR takes seconds to start, so it is tested once
def test_meteor_and_what_the_tokenizer_does() -> None:
    same = caption_scores(["A cat, on the mat!"], [["a cat on the mat"]], ["bleu_4", "meteor"])
    assert same.values == {"bleu_4": pytest.approx(1.0), "meteor": pytest.approx(1.0)}
    assert not same.left_out


def test_an_empty_caption_shifts_nothing() -> None:
    texts = [["a red disc"], ["a blue bar"], ["a green cross"]]
    scores = caption_scores(["", "a blue bar", "a green cross"], texts, ["rouge_l"]).values
    assert scores["rouge_l"] == pytest.approx(2 / 3)


@pytest.mark.usefixtures("plain_words")
def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    scores = caption_scores(["a Red disc."], [["a red disc"]], ["bleu_1", "meteor", "spice"])
    assert scores.values == {"bleu_1": pytest.approx(1.0)}
    assert set(scores.left_out) == {"ptb_tokenizer", "meteor", "spice"}
    assert "without meteor: there is no java" in caplog.text


@pytest.mark.parametrize(
    ("captions", "references"), [(["a"], []), (["a"], [[]]), ([], []), (["a"], [["b"], ["c"]])]
)
def test_images_without_references_are_refused(
    captions: list[str], references: list[list[str]]
) -> None:
    with pytest.raises(ValueError, match="images with references"):
        caption_scores(captions, references)


@needs_java
@pytest.mark.parametrize("breaking", ["\r", "\n", "\u2028", "\x85", "\x0b", "\x1c"])
def test_a_line_break_inside_a_reference_moves_no_other(breaking: str) -> None:
    """A line break inside a text does not shift later texts, although the tokenizer reads lines."""
    captions = ["a red flag on a hill", "two dogs in the snow", "a cup of tea"]
    references = [[f"{caption} today"] for caption in captions]
    plain = caption_scores(captions, references, ["cider"])
    references[0] = [f"a red flag{breaking}on a hill today"]
    assert caption_scores(captions, references, ["cider"]) == plain
    assert not plain.left_out


@pytest.mark.usefixtures("plain_words")
def test_figures_without_a_meaning_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caption_scores(["a dog"], [["a dog"]], ["cider"])
    assert "CIDEr of a single image" in caplog.text
    caplog.clear()
    caption_scores(["a dog", "a cat"], [["a dog"], ["a cat"]], ["bleu_1"])
    assert "space" not in caplog.text and "single" not in caplog.text


@pytest.mark.parametrize(
    ("captions", "references"),
    [
        (["一只狗在雪地里。", "一杯热茶"], ["一只猫在雪地里", "桌上有一杯茶。"]),
        (["หมาวิ่งในหิมะ", "ชาร้อน"], ["แมววิ่งในหิมะ", "ชาร้อนหนึ่งถ้วย"]),
    ],
)
def test_scripts_without_spaces_are_scored_by_character(
    captions: list[str], references: list[str]
) -> None:
    """The scores are those of the same texts with a space after every letter."""
    metrics = ["bleu_1", "bleu_4", "rouge_l", "cider", "meteor", "spice"]
    scores = caption_scores(captions, [[text] for text in references], metrics)
    assert scores.left_out["word_tokenizer"] == BY_CHARACTER
    assert scores.left_out["meteor"] == scores.left_out["spice"] == "it knows English alone"
    from pycocoevalcap.bleu.bleu import Bleu

    def spaced(texts: list[str]) -> dict[int, list[str]]:
        return {i: [" ".join(text.replace("。", ""))] for i, text in enumerate(texts)}

    expected, _ = Bleu(4).compute_score(spaced(references), spaced(captions), verbose=0)
    assert scores.values["bleu_1"] == pytest.approx(expected[0])
    assert scores.values["bleu_4"] == pytest.approx(expected[3])
    assert 0 < scores.values["bleu_1"] < 1 and scores.values["rouge_l"] > 0.3


def test_arabic_has_words(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["كلب كبير في الثلج", "كوب من الشاي الساخن"]
    scores = caption_scores(texts, [[text] for text in texts], ["bleu_1"])
    assert "word_tokenizer" not in scores.left_out and scores.values["bleu_1"] > 0.99
