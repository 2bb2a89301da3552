"""Caption metrics by pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

pycocoevalcap's PTB tokenizer, METEOR and SPICE are Java programs. At its first use, SPICE downloads
models from Stanford. Metrics that can't run are omitted, and the scores name them with the reason.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

logger = logging.getLogger(__name__)

CAPTION_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "spice")
_NO_JAVA = "there is no java on the PATH"

Texts = dict[int, list[str]]
_NO_WORDS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
"""Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
BY_CHARACTER = "most captions are in a script without spaces: each character counts as a word"
_ENGLISH_ONLY = ("meteor", "spice")


@dataclass(frozen=True)
class CaptionScores:
    """Scores by name, as pycocoevalcap returns them. Papers report them times 100."""

    values: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)
    """Missing metric, `ptb_tokenizer` or `word_tokenizer` -> reason."""


def caption_scores(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = CAPTION_METRICS,
) -> CaptionScores:
    """Score one caption of each image against the image's references.

    Args:
        captions: generated captions.
        references: one or more texts for each image.
        metrics: names from `CAPTION_METRICS`.

    Returns:
        Scores that could be computed. Without Java, texts are split at all characters except
        letters and digits, which changes the scores slightly. If most captions are in a script
        without spaces, each character counts as a word, and METEOR and SPICE, which support only
        English, are omitted. `left_out` names the tokenizer in both cases.

    Raises:
        ValueError: an image has no references, or the numbers of captions and images differ.
    """
    if len(captions) != len(references) or not all(references) or not captions:
        raise ValueError(
            f"captions: {len(captions)} for {len(references)} images with references, "
            f"{sum(not of_image for of_image in references)} of which have none"
        )
    left_out: dict[str, str] = {}
    # One Java program tokenizes all lines at once, so replace all kinds of white space by a space.
    texts: Texts = {}
    for image, (caption, of_image) in enumerate(zip(captions, references, strict=True)):
        texts[image] = [_one_line(text) for text in (caption, *of_image)]
    if len(texts) == 1:
        logger.warning("CIDEr of a single image has no meaning: it weighs words by other images")
    if _is_without_spaces(texts):
        words = {image: list(map(_characters, of_image)) for image, of_image in texts.items()}
        left_out["word_tokenizer"] = BY_CHARACTER
    else:
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
        if kind in _ENGLISH_ONLY and "word_tokenizer" in left_out:
            left_out[kind] = "it knows English alone"
            continue
        try:
            scores = measure()
            values |= {name: scores[name] for name in wanted}
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            left_out |= dict.fromkeys(wanted, " ".join(str(error).split())[:200])
    for name, reason in left_out.items():
        logger.warning("caption metrics: without %s: %s", name, reason)
    return CaptionScores({name: values[name] for name in metrics if name in values}, left_out)


def _one_line(text: str) -> str:
    """Replace line breaks, control characters and line separators by spaces."""
    return " ".join(_NO_WORDS.sub(" ", text).split())


def _is_without_spaces(texts: Texts) -> bool:
    """Whether most texts are in a script without spaces between words."""
    every = list(chain.from_iterable(texts.values()))
    return 2 * sum(_WITHOUT_SPACES.search(text) is not None for text in every) > len(every)


def _characters(text: str) -> str:
    """Return the lower-case letters, marks and digits of a text, separated by spaces."""
    return " ".join(c for c in text.lower() if unicodedata.category(c)[0] in "LMN")


def _bleu(truths: Texts, hypotheses: Texts) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu

    scores, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    return {f"bleu_{n}": float(score) for n, score in enumerate(scores, start=1)}


def _score(module: str, name: str, truths: Texts, hypotheses: Texts) -> float:
    scorer: Any = getattr(__import__(f"pycocoevalcap.{module}.{module}", fromlist=[name]), name)
    score, _ = scorer().compute_score(truths, hypotheses)
    return float(score)


def _by_java(module: str, name: str, truths: Texts, hypotheses: Texts) -> float:
    if shutil.which("java") is None:
        raise OSError(_NO_JAVA)
    return _score(module, name, truths, hypotheses)


def _tokenized(texts: Texts, left_out: dict[str, str]) -> Texts:
    """Split texts into lower-case words without punctuation, separated by spaces."""
    reason = _NO_JAVA
    if shutil.which("java") is not None:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # An empty text would shift the lines. The tokens of a full stop are also an empty text.
        lines = {}
        for image, of_image in texts.items():
            lines[image] = [{"caption": text.strip() or "."} for text in of_image]
        try:
            tokenized: Texts = PTBTokenizer().tokenize(lines)
            if [*map(len, tokenized.values())] == [*map(len, texts.values())]:
                return tokenized
            reason = "the PTB tokenizer gave another number of texts"
        except OSError as error:
            reason = str(error)
    left_out["ptb_tokenizer"] = f"{reason}; words are split at all but letters and digits"
    words = re.compile(r"\w+")
    split: Texts = {}
    for image, of_image in texts.items():
        split[image] = [" ".join(words.findall(text.lower())) for text in of_image]
    return split
