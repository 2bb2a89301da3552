"""Names of Hugging Face's BLIP and ours: a table, and state dicts through it both ways.

No tensor is transposed; ours are fused where theirs are several (query, key, value). Their text
encoder (retrieval) and text decoder (captioning) are two models; MED holds both in one stack.

Their models must be told BLIP's published sizes: vision layer_norm_eps 1e-6 (their default is 1e-5)
and the number of text heads (their default is 8).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["captioning", "retrieval"]
Row = tuple[str, tuple[str, ...]]
"""Our name and theirs, which are put one after another along the first dimension."""

_IGNORED = re.compile(r"position_ids$|^text_decoder\.cls\.predictions\.decoder\.bias$")
_OUR_LAYER = re.compile(r"^(vision\.blocks|text\.layers)\.(\d+)\.")
_THEIR_LAYER = re.compile(
    r"^(vision_model\.encoder\.layers|text_\w+\.(?:bert\.)?encoder\.layer)\.(\d+)\."
)

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TEXT_LAYER = {
    "cross_attention.query": ("crossattention.self.query",),
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.output": ("crossattention.output.dense",),
    "cross_attention.norm": ("crossattention.output.LayerNorm",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
    "mlp.norm": ("output.LayerNorm",),
}
_SELF_ATTENTION = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "output": ("attention.output.dense",),
    "norm": ("attention.output.LayerNorm",),
}
_LM_HEAD = {
    "dense.weight": "transform.dense.weight",
    "dense.bias": "transform.dense.bias",
    "norm.weight": "transform.LayerNorm.weight",
    "norm.bias": "transform.LayerNorm.bias",
    "weight": "decoder.weight",
    "bias": "bias",
}
_HEADS = ("vision_proj", "text_proj", "itm_head")
_PARTS = ("weight", "bias")


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a MED state dict that one of their models holds; load it with strict=False.

    BlipForConditionalGeneration lacks the encoder's self-attentions, BlipForImageTextRetrieval the
    decoder's, and each the heads of the other.

    Raises:
        ValueError: names that are missing or unknown.
    """
    kind: Kind = "captioning" if any(k.startswith("text_decoder.") for k in state) else "retrieval"
    table = list(_table(kind, *_depths(state, _THEIR_LAYER)))
    known = {name for _, theirs in table for name in theirs}
    missing = sorted(known - set(state))
    unknown = sorted(name for name in set(state) - known if not _IGNORED.search(name))
    if missing or unknown:
        raise ValueError(
            f"not a Hugging Face BLIP {kind} state dict: missing {_some(missing)}; "
            f"unknown {_some(unknown)}"
        )
    return {ours: torch.cat([state[name] for name in theirs]) for ours, theirs in table}


def to_huggingface(state: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """A MED state dict as that of BlipForConditionalGeneration ("captioning") or of
    BlipForImageTextRetrieval ("retrieval"); the tensors are views of the given ones.

    Raises:
        ValueError: names that are missing.
    """
    table = list(_table(kind, *_depths(state, _OUR_LAYER)))
    missing = sorted({ours for ours, _ in table} - set(state))
    if missing:
        raise ValueError(f"not the state dict of a MED: missing {_some(missing)}")
    result: dict[str, Tensor] = {}
    for ours, theirs in table:
        result |= zip(theirs, state[ours].chunk(len(theirs)), strict=True)
    if kind == "captioning":
        result["text_decoder.cls.predictions.decoder.bias"] = state["lm_head.bias"]
    return result


def _table(kind: Kind, vision_blocks: int, text_layers: int) -> Iterator[Row]:
    for ours, theirs in _VISION.items():
        yield f"vision.{ours}", (f"vision_model.{theirs}",)
    for i in range(vision_blocks):
        for ours, theirs in _VISION_BLOCK.items():
            for part in _PARTS:
                their_name = f"vision_model.encoder.layers.{i}.{theirs}.{part}"
                yield f"vision.blocks.{i}.{ours}.{part}", (their_name,)
    if kind == "captioning":
        yield from _text("text_decoder.bert", "self_attention_decoder", text_layers)
        for ours, theirs in _LM_HEAD.items():
            yield f"lm_head.{ours}", (f"text_decoder.cls.predictions.{theirs}",)
    else:
        yield from _text("text_encoder", "self_attention_encoder", text_layers)
        for head in _HEADS:
            for part in _PARTS:
                yield f"{head}.{part}", (f"{head}.{part}",)


def _text(prefix: str, self_attention: str, layers: int) -> Iterator[Row]:
    for ours, theirs in (("word", "word_embeddings"), ("position", "position_embeddings")):
        yield f"text.embeddings.{ours}.weight", (f"{prefix}.embeddings.{theirs}.weight",)
    for part in _PARTS:
        yield f"text.embeddings.norm.{part}", (f"{prefix}.embeddings.LayerNorm.{part}",)
    names = dict(_TEXT_LAYER)
    names |= {f"{self_attention}.{ours}": theirs for ours, theirs in _SELF_ATTENTION.items()}
    for i in range(layers):
        for ours, several in names.items():
            for part in _PARTS:
                their_names = tuple(f"{prefix}.encoder.layer.{i}.{name}.{part}" for name in several)
                yield f"text.layers.{i}.{ours}.{part}", their_names


def _depths(state: Mapping[str, Tensor], layer: re.Pattern[str]) -> tuple[int, int]:
    """Number of vision blocks and of text layers in the names of a state dict."""
    found = [match.groups() for match in map(layer.match, state) if match]
    blocks = {number for stack, number in found if stack.startswith("vision")}
    layers = {number for stack, number in found if not stack.startswith("vision")}
    return len(blocks), len(layers)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "none"
