"""A BERT checkpoint cut to the word pieces that a set of captions uses.

Most of a small BERT is its vocabulary: of all-MiniLM-L6-v2's 22.7M parameters 11.7M are embeddings
of 30,522 word pieces, of which the demo's captions use a tenth. Texts of the kept pieces are
tokenized as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file

from blip_scale.data.tokenizer import resolve_checkpoint
from blip_scale.storage import files

_WORDS = "embeddings.word_embeddings.weight"


def write_small_bert(folder: Path, checkpoint: str, captions: Iterable[str]) -> int:
    """Write `checkpoint` (as in `model.text.checkpoint`) with a smaller vocabulary to `folder`.

    Kept are the special tokens, every single ASCII character, so that any English text still has
    tokens, and every piece of `captions`. Returns the number of word pieces.
    """
    from transformers import AutoTokenizer, BertTokenizerFast

    source = Path(resolve_checkpoint(checkpoint))
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    used = {token for ids in tokenizer(list(captions))["input_ids"] for token in ids}
    used |= set(tokenizer.all_special_ids)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kept = [(p, i) for p, i in pieces if i in used or _is_letter(p)]
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("".join(f"{piece}\n" for piece, _ in kept), encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    weights = load_file(source / "model.safetensors")
    weights[_WORDS] = weights[_WORDS][[index for _, index in kept]].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files.follow_umask(folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": len(kept), "pad_token_id": [p for p, _ in kept].index("[PAD]")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(kept)


def _is_letter(piece: str) -> bool:
    character = piece.removeprefix("##")
    return len(character) == 1 and character.isascii()
