"""Loader of text weights from a Hugging Face checkpoint of BERT, RoBERTa or XLM-RoBERTa.

As published, encoder and decoder both start from BERT: each self-attention gets a copy of BERT's.
The LM head gets the MLM head if there is one. Poolers and token types are dropped, because BLIP has
none. Cross-attention and the word embeddings of [DEC] and [ENC], which BERT lacks, stay random.

RoBERTa has BERT's layers. Its positions begin after that of the padding token, so the rows before
them are dropped. The embedding of its only token type is added to all positions, so the function
of the network is unchanged.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from blip_scale.model.med import MED
from blip_scale.model.text import TextConfig
from blip_scale.storage import hub

log = logging.getLogger(__name__)

_FILES = ("model.safetensors", "pytorch_model.bin")
ROBERTA = ("roberta", "xlm-roberta", "camembert")
"""Values of `model_type` in config.json of checkpoints with RoBERTa's names and positions."""
_ROBERTA_NAMES = {
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.bias": "cls.predictions.bias",
}
"""Prefix of a RoBERTa name -> prefix of the BERT name."""
_TOKEN_TYPE = "embeddings.token_type_embeddings.weight"
_EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings"}
_SPECIAL = 2
"""Number of tokens that BERT's vocabulary lacks: [DEC] and [ENC]."""
_PADDING = 128
"""Some BERTs pad the rows of their word embeddings to a multiple of this number."""
_ROWS = ("text.embeddings.word.weight", "text.embeddings.position.weight", "lm_head.bias")
"""Parameters whose first rows are copied, as many as both sides have."""
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
    """Load the text stack of an initialised MED, not partitioned, from a folder or hub name.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: names are missing, shapes differ, there are too few layers, or the vocabulary
            differs. The message says which.
    """
    state = from_bert(_read(str(checkpoint)), med.config.text, _first_position(str(checkpoint)))
    words = med.config.text.vocab_size
    new = words - len(state["text.embeddings.word.weight"])
    if new <= -_PADDING:
        raise ValueError(
            f"text checkpoint {checkpoint} has {words - new} word rows, but the tokenizer {words} "
            "words with [DEC] and [ENC]: their vocabularies differ; leave model.text.tokenizer "
            "out, or set it to the tokenizer of the checkpoint"
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
    log.info("text weights from %s; %d word rows stay random", checkpoint, max(new, 0))
    if new not in (0, _SPECIAL):
        log.warning(
            "text checkpoint %s has %d word rows, the tokenizer %d words with [DEC] and [ENC]: "
            "correct only if the smaller vocabulary is the beginning of the larger one",
            checkpoint, words - new, words,
        )  # fmt: skip


def from_bert(
    state: Mapping[str, Tensor], config: TextConfig, first_position: int = 0
) -> dict[str, Tensor]:
    """Convert a BERT state dict to MED's parameter names, for the parameters that BERT has.

    Args:
        state: tensors with or without the prefix `bert.` or `roberta.`. Norms are named weight/bias
            or gamma/beta.
        config: sizes of the text stack. Its first `layers` layers are converted.
        first_position: row of the first position; above 0 in RoBERTa.

    Raises:
        ValueError: names are missing, or there are too few positions or layers for `config`.
    """
    plain = {_plain(name): value for name, value in state.items()}
    table = dict(_table(config.layers, "cls.predictions.bias" in plain))
    missing = sorted({name for names in table.values() for name in names} - set(plain))
    if missing:
        layers = {name.split(".")[2] for name in plain if name.startswith("encoder.layer.")}
        raise ValueError(
            f"text checkpoint: {len(missing)} names are missing, the first "
            f"{', '.join(missing[:3])} (it has {len(layers)} layers, "
            f"{config.layers} are asked for); use a BERT checkpoint, "
            "or a smaller model.text.layers"
        )
    result = {}
    for name, bert_names in table.items():
        result[name] = torch.cat([plain[bert_name] for bert_name in bert_names])
    if first_position:
        rows = result["text.embeddings.position.weight"][first_position:]
        if _TOKEN_TYPE in plain:
            rows = rows + plain[_TOKEN_TYPE][0]
        result["text.embeddings.position.weight"] = rows
    positions = len(result["text.embeddings.position.weight"])
    if positions < config.max_positions:
        raise ValueError(
            f"text checkpoint: it has {positions} positions, {config.max_positions} are asked for"
        )
    return result


def _plain(name: str) -> str:
    name = name.removeprefix("bert.").removeprefix("roberta.")
    for roberta, bert in _ROBERTA_NAMES.items():
        if name.startswith(roberta):
            name = bert + name.removeprefix(roberta)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _table(layers: int, mlm_head: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield pairs of a MED name and its BERT names, in order along the first dimension."""
    for ours, bert_name in _EMBEDDINGS.items():
        yield f"text.embeddings.{ours}.weight", (f"embeddings.{bert_name}.weight",)
    for part in ("weight", "bias"):
        yield f"text.embeddings.norm.{part}", (f"embeddings.LayerNorm.{part}",)
        for i in range(layers):
            layer = f"encoder.layer.{i}"
            for name, several in SELF_ATTENTION.items():
                bert_names = tuple(f"{layer}.{bert_name}.{part}" for bert_name in several)
                for use in ("encoder", "decoder"):
                    yield f"text.layers.{i}.self_attention_{use}.{name}.{part}", bert_names
            for name, bert_name in MLP.items():
                yield f"text.layers.{i}.mlp.{name}.{part}", (f"{layer}.{bert_name}.{part}",)
    if mlm_head:
        for ours, bert_name in LM_HEAD.items():
            yield f"lm_head.{ours}", (f"cls.predictions.{bert_name}",)


def _first_position(checkpoint: str) -> int:
    """Return the row of the first position; 0 without a config.json."""
    is_local = hub.is_local(checkpoint, ("config.json",), "model.text.checkpoint")
    path = cached_file(
        checkpoint,
        "config.json",
        local_files_only=is_local,
        _raise_exceptions_for_missing_entries=False,
    )
    if path is None:
        return 0
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    return config["pad_token_id"] + 1 if config.get("model_type") in ROBERTA else 0


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
        try:
            if name.endswith(".safetensors"):
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"text checkpoint {path} holds more than tensors, which is unsafe to read: {error}"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, LookupError, TypeError) as error:
            raise ValueError(f"text checkpoint {path} is damaged: {error}") from error
    raise FileNotFoundError(
        f"text checkpoint {checkpoint}: it has neither {' nor '.join(_FILES)}; "
        "give a folder with one of them, or a hub name"
    )
