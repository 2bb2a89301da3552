"""Names of BLIP's published code and ours: a table, and state dicts through it both ways.

No tensor is transposed; ours are fused where theirs are several (query, key, value). Their text
encoder and text decoder are two modules that share all but self-attention; MED holds both in one
stack. Their names are the common tongue of all conversions: Hugging Face's differ in the ViT alone.

Heads, the models that the published code makes files of: `pretrain` (all of it), `captioning`
(decoder), `retrieval` (encoder with its projections and matching head), `vqa` (encoder and a
decoder that reads the encoder's states), `nlvr2` (encoder with two cross-attentions). `visdial`
(encoder that reads image and caption) was never published; it is named alike.
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
"""Parts that have a momentum copy, named with `_m`."""
PARTS: dict[Head, tuple[str, ...]] = {
    "pretrain": (*TOWERS, "itm_head", "text_decoder", "temp"),
    "captioning": ("visual_encoder", "text_decoder"),
    "retrieval": (*TOWERS, "itm_head", "temp"),
    "vqa": ("visual_encoder", "text_encoder", "text_decoder"),
    "nlvr2": ("visual_encoder", "text_encoder"),
    "visdial": ("visual_encoder", "text_encoder", "itm_head"),
}
"""What each head holds; its training state (momentum copies, queues), `nlvr2`'s classifier and
`visdial`'s projection of captions come on top."""

_STATE = re.compile(r"^(\w+_m\.|(image|text|idx)_queue$|(queue_ptr|ptr_queue)$)")
_POSITION_IDS = ".embeddings.position_ids"
_WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
_PREDICTIONS = "text_decoder.cls.predictions."
TIED = {
    f"{_PREDICTIONS}decoder.weight": _WORDS,
    f"{_PREDICTIONS}decoder.bias": f"{_PREDICTIONS}bias",
}
"""Second names of one tensor in their decoder."""
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
    **{f"mlp.{ours}": (theirs,) for ours, theirs in MLP.items()},
}


def their_names(ours: str) -> dict[str, tuple[str, ...]]:
    """The part of BLIP -> its names, in order along the first dimension, of one MED parameter.

    Empty for a parameter that the published network doesn't have. Of the ViT each name passes as it
    is: timm has ViTs with parameters that the published one lacks.
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
    """The same of a parameter of MED's text stack, named within it."""
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
    return {
        part: tuple(f"{stack}.encoder.layer.{number}.{name}.{kind}" for name in several)
        for part, stack in stacks.items()
    }


def to_salesforce(med: Mapping[str, Tensor], head: Head) -> State:
    """MED parameters as the published layout of a head, without its training state. Parameters that
    the published network doesn't have are left out.

    Encoder and decoder get the same tensors where they share; fused ones are cut into views.
    Second names (tied tensors) and position_ids are there.

    Args:
        med: parameters by name; `lm_head.weight`, which is the word embedding, may be left out.
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
    """Parameters of MED by name, as far as the parts that are there reach.

    Args:
        state: published names, all of each part.
        names: of the MED's parameters.

    Raises:
        ValueError: encoder and decoder differ where MED has one tensor (fine-tuned apart).
    """
    result: State = {}
    for ours in names:
        found = [
            theirs for theirs in their_names(ours).values() if all(name in state for name in theirs)
        ]
        if not found:
            continue
        tensors = [_join(state, theirs) for theirs in found]
        if len(tensors) == 2 and not torch.equal(*tensors):
            raise ValueError(
                f"{found[0][0]} and {found[1][0]} differ: encoder and decoder were fine-tuned "
                "apart, and MED has one tensor for both; take the pretrained checkpoint"
            )
        result[ours] = tensors[0].reshape(1) if ours == "temperature.value" else tensors[0]
    return result


def _join(state: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    if len(names) == 1:
        return state[names[0]]
    return torch.cat([state[name] for name in names])


def complete(state: State) -> State:
    """The state with second names and position_ids, which some writers leave out."""
    for second, first in TIED.items():
        for missing, there in ((second, first), (first, second)):
            if missing not in state and there in state:
                state[missing] = state[there]
    for name, tensor in list(state.items()):
        if name.endswith(".embeddings.position_embeddings.weight"):
            ids = torch.arange(len(tensor), device=tensor.device)[None]
            state[name.removesuffix(".embeddings.position_embeddings.weight") + _POSITION_IDS] = ids
    return state


def momentum_to_salesforce(momentum: Mapping[str, Tensor], online: Mapping[str, Tensor]) -> State:
    """Momentum copies in the published layout.

    The published text copy has cross-attention too, which nothing reads; it gets the online
    weights.

    Args:
        momentum: parameters of a MomentumEncoder by name.
        online: the published layout of the model.
    """
    state: State = {}
    for name, tensor in online.items():
        part, _, rest = name.partition(".")
        if part in TOWERS:
            state[f"{part}_m.{rest}"] = tensor
    for ours, tensor in momentum.items():
        for part, names in their_names(ours).items():
            if part != "text_decoder":
                copies = (name.replace(part, f"{part}_m", 1) for name in names)
                state |= zip(copies, tensor.chunk(len(names)), strict=True)
    return state


def momentum_from_salesforce(state: Mapping[str, Tensor], config: MEDConfig) -> State:
    """Parameters of a MomentumEncoder by name; empty where there are no copies."""
    if not any(name.startswith("visual_encoder_m.") for name in state):
        return {}
    with torch.device("meta"):
        names = [name for name, _ in MomentumEncoder(config).named_parameters()]
    copies = {
        re.sub(r"^(\w+)_m\.", r"\1.", name): tensor
        for name, tensor in state.items()
        if name.partition(".")[0].endswith("_m")
    }
    return from_salesforce(copies, names)


def is_training_state(name: str) -> bool:
    """Whether it is a momentum copy, a queue or a queue's pointer."""
    return bool(_STATE.match(name))


def head_of(names: Iterable[str]) -> Head:
    """Which model's file it is, by its names.

    Raises:
        ValueError: it isn't BLIP.
    """
    names = list(names)
    parts = {name.partition(".")[0] for name in names}
    if any(".crossattention.self0." in name for name in names):
        return "nlvr2"
    if "visual_encoder" in parts and {"text_encoder", "text_decoder"} & parts:
        if "text_decoder" not in parts:
            if not {"vision_proj", "itm_head"} & parts:
                raise ValueError(
                    "it holds visual_encoder and text_encoder alone, as BLIP's feature extractor: "
                    "no projections, no matching head and no decoder, so it is none of "
                    "pretrain, captioning, retrieval, vqa and nlvr2; take the file that it was "
                    "made from"
                )
            return "retrieval" if "vision_proj" in parts else "visdial"
        if "text_encoder" not in parts:
            return "captioning"
        return "pretrain" if {"itm_head", "vision_proj"} & parts else "vqa"
    shown = ", ".join(sorted(parts)[:5]) or "nothing"
    raise ValueError(
        f"it isn't BLIP: it holds {shown}{', ...' if len(parts) > 5 else ''}; expected "
        "visual_encoder with text_encoder or text_decoder"
    )
