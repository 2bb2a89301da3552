"""A BERT checkpoint cut to the word pieces that a set of captions uses, and to a smaller width.

Most of a small BERT is its vocabulary: of all-MiniLM-L6-v2's 22.7M parameters 11.7M are embeddings
of 30,522 word pieces, of which the demo's captions use a tenth. Texts of the kept pieces are
tokenized as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blip_scale.data.tokenizer import resolve_checkpoint
from blip_scale.storage import files

if TYPE_CHECKING:
    from torch import Tensor

_WORDS = "embeddings.word_embeddings.weight"
_INIT_STD = (
    0.05  # of layers that begin at random: about 1 / sqrt(width), as for a ViT of this width
)


@dataclass(frozen=True)
class SmallerSizes:
    """Sizes of a BERT that keeps only another one's word embeddings."""

    hidden_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 3
    intermediate_size: int = 768


def write_small_bert(
    folder: Path, checkpoint: str, captions: Iterable[str], sizes: SmallerSizes | None = None
) -> int:
    """Write `checkpoint` (as in `model.text.checkpoint`) with a smaller vocabulary to `folder`.

    Kept are the special tokens, every single ASCII character, so that any English text still has
    tokens, and every piece of `captions`. With `sizes`, the word embeddings are projected on their
    principal components and all other weights are random, the same in every call. Returns the
    number of word pieces.
    """
    from safetensors.torch import load_file, save_file  # here, as other sets need no torch
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
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": len(kept), "pad_token_id": [p for p, _ in kept].index("[PAD]")}
    if sizes is not None:
        config |= asdict(sizes) | {"initializer_range": _INIT_STD}
        weights = _narrowed(weights[_WORDS], config)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files.follow_umask(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(kept)


def _narrowed(word_embeddings: Tensor, config: dict) -> dict[str, Tensor]:
    """Random weights of a BERT with the sizes of `config`, and its word embeddings.

    `word_embeddings` are (words, any width). They are projected on as many principal components as
    the BERT is wide, and scaled to the standard deviation of the other weights.
    """
    import torch
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = BertModel(BertConfig.from_dict(config)).state_dict()
    centred = word_embeddings - word_embeddings.mean(dim=0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[: config["hidden_size"]]
    projected = centred @ components.T
    weights[_WORDS] = projected * (config["initializer_range"] / projected.std())
    return {name: weight.contiguous() for name, weight in weights.items()}


def _is_letter(piece: str) -> bool:
    character = piece.removeprefix("##")
    return len(character) == 1 and character.isascii()
