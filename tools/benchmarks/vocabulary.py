"""Synthetic WordPiece vocabulary for benchmarks, which needs no package and no download."""

from __future__ import annotations

import json
import string
from pathlib import Path

BERT_SIZE = 30_522
"""Number of tokens of bert-base-uncased."""
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_tokenizer(folder: Path, size: int = BERT_SIZE) -> Path:
    """Write a BERT tokenizer with `size` tokens: special ones, letters, and words of five letters.

    Every word is one token. Returns the folder, a valid value of `model.text.tokenizer`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase
    tokens = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    for number in range(size - len(tokens)):
        tokens.append(_word(number))
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _word(number: int) -> str:
    """`number` in base 26, written with five letters."""
    digits = []
    for _ in range(5):
        number, digit = divmod(number, 26)
        digits.append(string.ascii_lowercase[digit])
    return "".join(reversed(digits))
