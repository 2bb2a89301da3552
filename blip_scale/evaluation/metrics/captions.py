"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE by pycocoevalcap, with which papers measure captions.

Its tokenizer (PTB), METEOR and SPICE are Java programs; SPICE fetches models from Stanford the
first time. What is not there is left out, and the scores say so.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

CAPTION_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "spice")
_NO_JAVA = "there is no java on the PATH"

Texts = dict[int, list[str]]
_NO_WORDS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST_WORD = 8
"""Characters; a longer text without a space is likely more than a word."""


@dataclass(frozen=True)
class CaptionScores:
    """Figures by name, as pycocoevalcap gives them: papers print them times 100."""

    values: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    """What is missing (a metric, or `ptb_tokenizer`) and why."""


def caption_scores(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = CAPTION_METRICS,
) -> CaptionScores:
    """Scores of one caption an image against the references of the image.

    Args:
        captions: generated.
        references: one or more texts an image.
        metrics: of `CAPTION_METRICS`.

    Returns:
        What could be measured. Without Java the texts are split at everything that is no letter or
        digit, which moves the figures a little: `left_out` names the tokenizer then.

    Raises:
        ValueError: an image without references, or not as many captions as images.
    """
    if len(captions) != len(references) or not all(references) or not captions:
        raise ValueError(
            f"captions: {len(captions)} for {len(references)} images with references, "
            f"{sum(not own for own in references)} of which have none"
        )
    left_out: dict[str, str] = {}
    # One Java program tokenizes both. It reads lines: white space of any kind becomes a space.
    texts: Texts = {}
    for image, (caption, of_image) in enumerate(zip(captions, references, strict=True)):
        texts[image] = [_one_line(text) for text in (caption, *of_image)]
    _warn_of_meaningless(texts)
    words = _tokenized(texts, left_out)
    hypotheses = {i: texts[:1] for i, texts in words.items()}
    truths = {i: texts[1:] for i, texts in words.items()}
    values: dict[str, float] = {}
    scorers: dict[str, Callable[[], dict[str, float]]] = {
        "bleu": lambda: _bleu(truths, hypotheses),
        "meteor": lambda: {"meteor": _by_java("meteor", "Meteor", truths, hypotheses)},
        "rouge": lambda: {"rouge_l": _score("rouge", "Rouge", truths, hypotheses)},
        "cider": lambda: {"cider": _score("cider", "Cider", truths, hypotheses)},
        "spice": lambda: {"spice": _by_java("spice", "Spice", truths, hypotheses)},
    }
    for kind, measure in scorers.items():
        wanted = [name for name in metrics if name.startswith(kind)]
        if not wanted:
            continue
        try:
            found = measure()
            values |= {name: found[name] for name in wanted}
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            left_out |= dict.fromkeys(wanted, " ".join(str(error).split())[:200])
    for name, reason in left_out.items():
        logger.warning("caption metrics: without %s: %s", name, reason)
    return CaptionScores({name: values[name] for name in metrics if name in values}, left_out)


def _one_line(text: str) -> str:
    """A text without line breaks, control characters and line separators."""
    return " ".join(_NO_WORDS.sub(" ", text).split())


def _warn_of_meaningless(texts: Texts) -> None:
    """Say in the log when figures can't be compared with any that are published."""
    if len(texts) == 1:
        logger.warning("CIDEr of a single image has no meaning: it weighs words by other images")
    words = [text for of_image in texts.values() for text in of_image]
    unspaced = sum(len(text) > _LONGEST_WORD and " " not in text for text in words)
    if 2 * unspaced > len(words):
        logger.warning(
            "%d of %d captions have no space between words, and each counts as one word: split "
            "them before, by a word segmenter of the language or into characters",
            unspaced, len(words),
        )  # fmt: skip


def _bleu(truths: Texts, hypotheses: Texts) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu

    found, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    return {f"bleu_{n}": float(value) for n, value in enumerate(found, start=1)}


def _score(module: str, name: str, truths: Texts, hypotheses: Texts) -> float:
    scorer: Any = getattr(__import__(f"pycocoevalcap.{module}.{module}", fromlist=[name]), name)
    found, _ = scorer().compute_score(truths, hypotheses)
    return float(found)


def _by_java(module: str, name: str, truths: Texts, hypotheses: Texts) -> float:
    if shutil.which("java") is None:
        raise OSError(_NO_JAVA)
    return _score(module, name, truths, hypotheses)


def _tokenized(texts: Texts, left_out: dict[str, str]) -> Texts:
    """Lower-cased words, a space between them, without punctuation."""
    reason = _NO_JAVA
    if shutil.which("java") is not None:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # A text that is empty would shift the lines; of a full stop nothing is left either.
        lines = {i: [{"caption": text.strip() or "."} for text in own] for i, own in texts.items()}
        try:
            found: Texts = PTBTokenizer().tokenize(lines)
            if [len(own) for own in found.values()] == [len(own) for own in texts.values()]:
                return found
            reason = "the PTB tokenizer gave another number of texts"
        except OSError as error:
            reason = str(error)
    left_out["ptb_tokenizer"] = f"{reason}; words are split at all but letters and digits"
    words = re.compile(r"\w+")
    return {i: [" ".join(words.findall(t.lower())) for t in own] for i, own in texts.items()}
