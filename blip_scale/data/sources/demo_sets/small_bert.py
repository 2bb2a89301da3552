"""Reduce a BERT checkpoint to the word pieces of a set of captions, and to a smaller width.

The vocabulary is about half of a small BERT: all-MiniLM-L6-v2 has 22.7M parameters, of which 11.7M
are the embeddings of 30,522 word pieces. The demo's captions use a tenth of these pieces. The
tokenization of texts that consist of kept pieces does not change.
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
    0.05  # of randomly initialised layers: about 1 / sqrt(width), as for a ViT of this width
)


@dataclass(frozen=True)
class SmallerSizes:
    """Sizes of a smaller BERT, which keeps only the word embeddings of the original."""

    hidden_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 3
    intermediate_size: int = 768


def write_small_bert(
    folder: Path, checkpoint: str, captions: Iterable[str], sizes: SmallerSizes | None = None
) -> int:
    """Write a checkpoint with a smaller vocabulary to `folder`, and return its size in word pieces.

    The vocabulary keeps the special tokens, all pieces of `captions`, and every single ASCII
    character, so that any English text can be tokenized.

    Args:
        folder: output folder.
        checkpoint: a value of `model.text.checkpoint`.
        captions: texts whose word pieces are kept.
        sizes: smaller sizes of the network. The word embeddings are then projected onto their
            principal components, and all other weights are random, equal in every call.
    """
    from safetensors.torch import load_file, save_file  # late: other sets do not need torch
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
    """Return random weights of a BERT with the sizes of `config`, except for its word embeddings.

    `word_embeddings` has the shape (words, any width). It is projected onto its first
    `hidden_size` principal components, and scaled to the standard deviation of the other weights.
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
