"""Conversion of published parameter names to Hugging Face's and back. Only the ViT's differ."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from blip_scale.interop.salesforce import State, is_training_state

VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
VISION_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def their_vision(name: str) -> str | None:
    """Return Hugging Face's name of a ViT parameter, or None if it has none."""
    block = re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)$", name)
    if block:
        module_name = VISION_BLOCK.get(block[2])
        return module_name and f"encoder.layers.{block[1]}.{module_name}.{block[3]}"
    if name in VISION:
        return VISION[name]
    module, _, kind = name.rpartition(".")
    return f"{VISION[module]}.{kind}" if module in VISION else None


def to_huggingface(state: Mapping[str, Tensor]) -> State:
    """Convert published names to Hugging Face's, without position_ids, training state and temp."""
    result = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if name.endswith("position_ids") or name == "temp" or is_training_state(name):
            continue
        result[f"vision_model.{their_vision(rest)}" if part == "visual_encoder" else name] = tensor
    return result


def from_huggingface(state: Mapping[str, Tensor]) -> State:
    """Convert Hugging Face's names to the published ones; unknown names are kept."""
    blocks = {their_name: ours for ours, their_name in VISION_BLOCK.items()}
    whole = {their_name: ours for ours, their_name in VISION.items()}
    result = {}
    for name, tensor in state.items():
        rest = name.removeprefix("vision_model.")
        block = re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", rest)
        module, _, kind = rest.rpartition(".")
        if rest == name:
            ours = name
        elif block and block[2] in blocks:
            ours = f"visual_encoder.blocks.{block[1]}.{blocks[block[2]]}.{block[3]}"
        elif rest in whole:
            ours = f"visual_encoder.{whole[rest]}"
        else:
            ours = f"visual_encoder.{whole[module]}.{kind}" if module in whole else name
        result[ours] = tensor
    return result
