"""Conversion of MED's parameter names to those of BLIP's published code ("Salesforce") and back.

No tensor is transposed. MED fuses query, key and value, which are separate in the published code.
The published text encoder and text decoder are two modules that share all weights except
self-attention; MED holds both in one stack. All conversions go through the published names. Hugging
Face's names differ from them only in the ViT.

A head is one of the models for which the published code writes files:

- `pretrain`: the whole network,
- `captioning`: the decoder,
- `retrieval`: the encoder with its projections and matching head,
- `vqa`: the encoder, and a decoder that reads the encoder's states,
- `nlvr2`: the encoder with two cross-attentions,
- `visdial`: an encoder that reads image and caption. It was never published, but its names follow
  the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from blip_scale.interop.bert import LM_HEAD, MLP, SELF_ATTENTION
from blip_scale.model.heads import Head
from blip_scale.model.med import MEDConfig, MomentumEncoder

State = dict[str, Tensor]

TOWERS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
"""Parts that have a momentum copy. The copy's name ends in `_m`."""
PARTS: dict[Head, tuple[str, ...]] = {
    "pretrain": (*TOWERS, "itm_head", "text_decoder", "temp"),
    "captioning": ("visual_encoder", "text_decoder"),
    "retrieval": (*TOWERS, "itm_head", "temp"),
    "vqa": ("visual_encoder", "text_encoder", "text_decoder"),
    "nlvr2": ("visual_encoder", "text_encoder"),
    "visdial": ("visual_encoder", "text_encoder", "itm_head"),
}
"""Head -> its parts, without training state (momentum copies, queues), the classifier of `nlvr2`
and the caption projection of `visdial`."""

_STATE = re.compile(r"^(\w+_m\.|(image|text|idx)_queue$|(queue_ptr|ptr_queue)$)")
_POSITION_IDS = ".embeddings.position_ids"
_WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
_PREDICTIONS = "text_decoder.cls.predictions."
TIED = {
    f"{_PREDICTIONS}decoder.weight": _WORDS,
    f"{_PREDICTIONS}decoder.bias": f"{_PREDICTIONS}bias",
}
"""Second name -> first name of a tensor that the published decoder stores under two names."""
_EMBEDDINGS = {
    "word.weight": "word_embeddings.weight",
    "position.weight": "position_embeddings.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
}
_LINEAR_HEADS = ("vision_proj", "text_proj", "itm_head")
_KINDS = ("weight", "bias")
_TEXT_LAYER = {
    "cross_attention.query": ("crossattention.self.query",),
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.output": ("crossattention.output.dense",),
    "cross_attention.norm": ("crossattention.output.LayerNorm",),
    **{f"mlp.{ours}": (published,) for ours, published in MLP.items()},
}


def their_names(ours: str) -> dict[str, tuple[str, ...]]:
    """Return the published names of one MED parameter, by part of the published network.

    The names of a part are in order along the first dimension of the parameter. The result is empty
    for a parameter that the published network lacks. Every name of the ViT is kept, because some
    timm ViTs have parameters that the published one lacks.
    """
    section, _, rest = ours.partition(".")
    if section == "vision":
        return {"visual_encoder": (f"visual_encoder.{rest}",)}
    if ours == "temperature.value":
        return {"temp": ("temp",)}
    if section == "lm_head" and rest in LM_HEAD:
        return {"text_decoder": (_PREDICTIONS + LM_HEAD[rest],)}
    if section in _LINEAR_HEADS and rest in _KINDS:
        return {section: (ours,)}
    return _their_text_names(rest) if section == "text" else {}


def _their_text_names(ours: str) -> dict[str, tuple[str, ...]]:
    """Return the published names like `their_names`, for a name within MED's text stack."""
    stacks = {"text_encoder": "text_encoder", "text_decoder": "text_decoder.bert"}
    section, _, rest = ours.partition(".")
    if section == "embeddings":
        name = _EMBEDDINGS.get(rest)
        return {part: (f"{stack}.embeddings.{name}",) for part, stack in stacks.items() if name}
    number, _, rest = rest.partition(".")
    block, _, inner = rest.partition(".")
    if block.startswith("self_attention_"):
        part = block.replace("self_attention", "text")
        stacks = {part: stacks[part]}
        module, _, kind = inner.rpartition(".")
        several = SELF_ATTENTION.get(module)
    else:
        module, _, kind = rest.rpartition(".")
        several = _TEXT_LAYER.get(module)
    if several is None or section != "layers" or kind not in _KINDS:
        return {}
    names = {}
    for part, stack in stacks.items():
        layer = f"{stack}.encoder.layer.{number}"
        names[part] = tuple(f"{layer}.{name}.{kind}" for name in several)
    return names


def to_salesforce(med: Mapping[str, Tensor], head: Head) -> State:
    """Convert MED parameters to the published layout of a head, without training state.

    Parameters that the published network lacks are dropped. Encoder and decoder share tensors where
    MED has only one. Fused tensors are split into views. Second names of tied tensors and
    position_ids are included.

    Args:
        med: parameters by name. `lm_head.weight`, which is the word embedding, may be missing.
        head: model to convert to.
    """
    state: State = {}
    for ours, tensor in med.items():
        if ours == "lm_head.weight":
            continue
        for part, names in their_names(ours).items():
            if part in PARTS[head]:
                pieces = (tensor.reshape(()),) if part == "temp" else tensor.chunk(len(names))
                state |= zip(names, pieces, strict=True)
    return complete(state)


def from_salesforce(state: Mapping[str, Tensor], names: Iterable[str]) -> State:
    """Convert the published layout to MED parameters, for the parts that the state has.

    Args:
        state: tensors by published name; each part must be complete.
        names: names of the MED parameters to return.

    Raises:
        ValueError: encoder and decoder differ in a tensor that MED shares, because they were
            fine-tuned separately.
    """
    result: State = {}
    for ours in names:
        sources = []
        for published in their_names(ours).values():
            if all(name in state for name in published):
                sources.append(published)
        if not sources:
            continue
        tensors = [_join(state, published) for published in sources]
        if len(tensors) == 2 and not torch.equal(*tensors):
            raise ValueError(
                f"{sources[0][0]} and {sources[1][0]} differ: encoder and decoder were fine-tuned "
                "apart, and MED has one tensor for both; use the pretrained checkpoint"
            )
        result[ours] = tensors[0].reshape(1) if ours == "temperature.value" else tensors[0]
    return result


def _join(state: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    if len(names) == 1:
        return state[names[0]]
    return torch.cat([state[name] for name in names])


def complete(state: State) -> State:
    """Add second names and position_ids, which some writers omit, to a state in place."""
    for second, first in TIED.items():
        for missing, present in ((second, first), (first, second)):
            if missing not in state and present in state:
                state[missing] = state[present]
    for name, tensor in list(state.items()):
        if name.endswith(".embeddings.position_embeddings.weight"):
            ids = torch.arange(len(tensor), device=tensor.device)[None]
            state[name.removesuffix(".embeddings.position_embeddings.weight") + _POSITION_IDS] = ids
    return state


def momentum_to_salesforce(momentum: Mapping[str, Tensor], online: Mapping[str, Tensor]) -> State:
    """Convert momentum copies to the published layout.

    The published copy of the text encoder has cross-attention, which is never read. It gets the
    online weights.

    Args:
        momentum: parameters of a MomentumEncoder by name.
        online: weights of the model in the published layout.
    """
    state: State = {}
    for name, tensor in online.items():
        part, _, rest = name.partition(".")
        if part in TOWERS:
            state[f"{part}_m.{rest}"] = tensor
    for ours, tensor in momentum.items():
        for part, names in their_names(ours).items():
            if part in TOWERS:
                copies = (name.replace(part, f"{part}_m", 1) for name in names)
                state |= zip(copies, tensor.chunk(len(names)), strict=True)
    return state


def momentum_from_salesforce(state: Mapping[str, Tensor], config: MEDConfig) -> State:
    """Convert momentum copies to parameters of a MomentumEncoder; empty if there are no copies."""
    if not any(name.startswith("visual_encoder_m.") for name in state):
        return {}
    with torch.device("meta"):
        names = [name for name, _ in MomentumEncoder(config).named_parameters()]
    copies = {}
    for name, tensor in state.items():
        if name.partition(".")[0].endswith("_m"):
            copies[re.sub(r"^(\w+)_m\.", r"\1.", name)] = tensor
    return from_salesforce(copies, names)


def is_training_state(name: str) -> bool:
    """Return True for a momentum copy, a queue or a queue's pointer."""
    return bool(_STATE.match(name))


def head_of(names: Iterable[str]) -> Head:
    """Find the head of a file by the names of its tensors.

    Raises:
        ValueError: the names are not those of a BLIP model.
    """
    names = list(names)
    parts = {name.partition(".")[0] for name in names}
    if any(".crossattention.self0." in name for name in names):
        return "nlvr2"
    if "visual_encoder" in parts and {"text_encoder", "text_decoder"} & parts:
        if "text_decoder" not in parts:
            if not {"vision_proj", "itm_head"} & parts:
                raise ValueError(
                    "it holds visual_encoder and text_encoder only, like BLIP's feature extractor: "
                    "without projections, matching head or decoder it is not one of pretrain, "
                    "captioning, retrieval, vqa and nlvr2; use the file that it was made from"
                )
            return "retrieval" if "vision_proj" in parts else "visdial"
        if "text_encoder" not in parts:
            return "captioning"
        return "pretrain" if {"itm_head", "vision_proj"} & parts else "vqa"
    shown = ", ".join(sorted(parts)[:5]) or "nothing"
    raise ValueError(
        f"not a BLIP model: it holds {shown}{', ...' if len(parts) > 5 else ''}; expected "
        "visual_encoder with text_encoder or text_decoder"
    )
