"""Text weights from any Hugging Face BERT-type checkpoint (BertModel, BertForMaskedLM, ...).

As published (encoder and decoder both start from BERT): the encoder's and the decoder's
self-attention each get a copy of BERT's, the LM head gets the MLM head where there is one. Poolers
and token types have no place in BLIP and are dropped. What BERT lacks keeps its random start:
cross-attention and the word rows of [DEC] and [ENC].
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from blip_scale.model.med import MED
from blip_scale.model.text import TextConfig
from blip_scale.storage import hub

log = logging.getLogger(__name__)

_FILES = ("model.safetensors", "pytorch_model.bin")
_EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings"}
_SPECIAL = 2
"""[DEC] and [ENC], which BERT's vocabulary lacks."""
_PADDING = 128
"""Word rows that a BERT may have beyond the tokenizer's words: some pad to a multiple of this."""
_ROWS = ("text.embeddings.word.weight", "text.embeddings.position.weight", "lm_head.bias")
"""Their first rows are taken, as many as both sides have."""
SELF_ATTENTION = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "output": ("attention.output.dense",),
    "norm": ("attention.output.LayerNorm",),
}
MLP = {"fc1": "intermediate.dense", "fc2": "output.dense", "norm": "output.LayerNorm"}
LM_HEAD = {
    "dense.weight": "transform.dense.weight",
    "dense.bias": "transform.dense.bias",
    "norm.weight": "transform.LayerNorm.weight",
    "norm.bias": "transform.LayerNorm.bias",
    "bias": "bias",
}


def load_bert(med: MED, checkpoint: str | Path) -> None:
    """Fills the text stack of an initialised plain MED from a checkpoint folder or hub name.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: missing names, shapes that don't fit, too few layers, all named; or word rows
            of another vocabulary.
    """
    state = from_bert(_read(str(checkpoint)), med.config.text)
    words = med.config.text.vocab_size
    new = words - len(state["text.embeddings.word.weight"])
    if new <= -_PADDING:
        raise ValueError(
            f"text checkpoint {checkpoint} has {words - new} word rows, the tokenizer {words} "
            "words with [DEC] and [ENC]: they are of different vocabularies; leave "
            "model.text.tokenizer out, or give the tokenizer of the checkpoint"
        )
    parameters = dict(med.named_parameters())
    wrong = []
    for name, value in state.items():
        target: Tensor = parameters[name]
        if name in _ROWS:
            rows = min(len(target), len(value))
            value, target = value[:rows], target[:rows]
        if value.shape != target.shape:
            wrong.append(f"{name} {tuple(value.shape)}, wanted {tuple(target.shape)}")
            continue
        with torch.no_grad():
            target.copy_(value)
    if wrong:
        raise ValueError(f"text checkpoint {checkpoint}: shapes don't fit: {'; '.join(wrong[:5])}")
    log.info("text weights from %s; %d word rows keep their random start", checkpoint, max(new, 0))
    if new not in (0, _SPECIAL):
        log.warning(
            "text checkpoint %s has %d word rows, the tokenizer %d words with [DEC] and [ENC]: "
            "right only if its words are the first of the other's, in the same order",
            checkpoint, words - new, words,
        )  # fmt: skip


def from_bert(state: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """A BERT state dict under MED's parameter names, as far as BERT reaches.

    Args:
        state: with or without the prefix `bert.`, norms named weight/bias or gamma/beta.
        config: tells how many layers are taken (the first ones).

    Raises:
        ValueError: missing names, or a vocabulary, positions or depth too small for `config`.
    """
    plain = {_plain(name): value for name, value in state.items()}
    table = dict(_table(config.layers, "cls.predictions.bias" in plain))
    missing = sorted({name for names in table.values() for name in names} - set(plain))
    if missing:
        there = {name.split(".")[2] for name in plain if name.startswith("encoder.layer.")}
        raise ValueError(
            f"text checkpoint: {len(missing)} names are missing, the first "
            f"{', '.join(missing[:3])} (it has {len(there)} layers, "
            f"{config.layers} are asked for); take a BERT-type checkpoint, "
            "or a smaller model.text.layers"
        )
    result = {ours: torch.cat([plain[name] for name in theirs]) for ours, theirs in table.items()}
    positions = len(result["text.embeddings.position.weight"])
    if positions < config.max_positions:
        raise ValueError(
            f"text checkpoint: it has {positions} positions, {config.max_positions} are asked for"
        )
    return result


def _plain(name: str) -> str:
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _table(layers: int, mlm_head: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our name, their names), theirs one after another along the first dimension."""
    for ours, theirs in _EMBEDDINGS.items():
        yield f"text.embeddings.{ours}.weight", (f"embeddings.{theirs}.weight",)
    for part in ("weight", "bias"):
        yield f"text.embeddings.norm.{part}", (f"embeddings.LayerNorm.{part}",)
        for i in range(layers):
            layer = f"encoder.layer.{i}"
            for name, several in SELF_ATTENTION.items():
                their_names = tuple(f"{layer}.{theirs}.{part}" for theirs in several)
                for use in ("encoder", "decoder"):
                    yield f"text.layers.{i}.self_attention_{use}.{name}.{part}", their_names
            for name, theirs in MLP.items():
                yield f"text.layers.{i}.mlp.{name}.{part}", (f"{layer}.{theirs}.{part}",)
    if mlm_head:
        for ours, theirs in LM_HEAD.items():
            yield f"lm_head.{ours}", (f"cls.predictions.{theirs}",)


def _read(checkpoint: str) -> Mapping[str, Tensor]:
    is_local = hub.is_local(checkpoint, _FILES, "model.text.checkpoint")
    for name in _FILES:
        try:
            path = cached_file(
                checkpoint,
                name,
                local_files_only=is_local,
                _raise_exceptions_for_missing_entries=False,
            )
        except OSError as error:
            raise FileNotFoundError(f"text checkpoint {checkpoint}: {error}") from error
        if path is None:
            continue
        if name.endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    raise FileNotFoundError(
        f"text checkpoint {checkpoint}: neither {' nor '.join(_FILES)} lies there; "
        "give a folder with one of them or a hub name"
    )
