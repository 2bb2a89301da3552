"""Conversion of MEDConfig to transformers' BlipConfig and back, and a check that it is possible.

Two defaults of BlipConfig differ from BLIP's published sizes: the vision layer_norm_eps (1e-5
instead of 1e-6) and the number of text heads (8 instead of 12). Both are always written.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blip_scale.interop import output_settings
from blip_scale.interop.blip_weights import BlipWeights
from blip_scale.interop.huggingface_names import VISION, VISION_BLOCK, their_vision
from blip_scale.model.heads import Head
from blip_scale.model.med import MEDConfig
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.towers import ImageTower
from blip_scale.model.vision import VisionConfig, build_vision

if TYPE_CHECKING:
    from transformers import BlipConfig, BlipTextConfig

CLASSES: dict[Head, str] = {
    "captioning": "BlipForConditionalGeneration",
    "retrieval": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
}
_PUBLISHED_CLS = 101


def blip_config(weights: BlipWeights) -> BlipConfig:
    """Build the BlipConfig. Extra entries hold temperature, steps and output settings."""
    from transformers import BlipConfig, BlipVisionConfig

    config, text = weights.config, weights.config.text
    with torch.device("meta"):
        vit = build_vision(config.vision)
    vision = BlipVisionConfig(
        hidden_size=vit.embed_dim,
        intermediate_size=vit.mlp_width,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.heads,
        image_size=config.vision.image_size,
        patch_size=vit.patch_embed.patch_size[0],
        hidden_act="gelu",
        layer_norm_eps=vit.norm.eps,
        initializer_range=0.02,  # the default of 1e-10 is useless for training from scratch
    )
    text_section = text_config(text, vit.embed_dim)
    # transformers always scores by its own rule, whatever the settings are.
    output = replace(weights.output_settings, scoring="huggingface")
    extra: dict[str, Any] = {output_settings.KEY: asdict(output)}
    if "temp" in weights.state:
        temperature = weights.state["temp"]
        extra |= {
            "itc_temperature": temperature.item(),
            "logit_scale_init_value": -temperature.log().item(),
        }
    if weights.step is not None:
        extra["training_steps"] = weights.step
    return BlipConfig(
        text_config=text_section.to_dict(),
        vision_config=vision.to_dict(),
        image_text_hidden_size=config.embed_dim,
        architectures=[CLASSES[weights.head]],
        dtype="float32",
        **extra,
    )


def text_config(text: TextConfig, image_width: int) -> BlipTextConfig:
    """Build the BlipTextConfig of a text stack with image tokens of width `image_width`."""
    from transformers import BlipTextConfig

    special = text.special
    return BlipTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        encoder_hidden_size=image_width,
        intermediate_size=text.mlp_width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.max_positions,
        hidden_act="gelu",
        layer_norm_eps=text.norm_eps,
        bos_token_id=special.dec,
        eos_token_id=special.sep,  # the default of 2 never occurs, so no caption would end
        sep_token_id=special.sep,
        pad_token_id=special.pad,
        cls_token_id=special.cls,
        enc_token_id=special.enc,
        is_decoder=True,
    )


def inexpressible(weights: BlipWeights) -> str | None:
    """Explain why transformers' BLIP classes cannot hold this network; None if they can."""
    if weights.head not in CLASSES:
        fix = f"give --head: one of {', '.join(CLASSES)}"
        if weights.head != "pretrain":  # a fine-tuned head cannot be converted to another one
            fix = "give OUT a name that ends in .pth"
        return f"transformers has no such class; {fix}"
    with torch.device("meta"):
        vision = build_vision(weights.config.vision)
    reason = _unlike_blips(vision)
    if reason:
        return (
            f"{weights.config.vision.name}: {reason}. Write a training checkpoint (--to ours); "
            "load_blip of blip_scale.inference.loading reads it"
        )
    if weights.head == "vqa" and weights.config.text.width != vision.embed_dim:
        return (
            f"BlipForQuestionAnswering has one width for the inputs of encoder and decoder, but "
            f"here they are {vision.embed_dim} (image tokens) and {weights.config.text.width} "
            "(question states)"
        )
    return None


def _unlike_blips(vision: ImageTower) -> str | None:
    """Describe a property of a tower that BlipVisionModel cannot express; None if there is none."""
    names = set(vision.state_dict())
    unsupported = [name for name in names if their_vision(name) is None]
    if unsupported:
        kinds = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in unsupported})
        return f"BlipVisionModel has nothing for {', '.join(kinds[:4])} of this ViT"
    required = set()
    for module in (*VISION, *(f"blocks.0.{name}" for name in VISION_BLOCK)):
        is_parameter = module in ("cls_token", "pos_embed")
        required |= {module} if is_parameter else {f"{module}.weight", f"{module}.bias"}
    absent = sorted(required - names)
    if absent:
        return f"BlipVisionModel has {absent[0]}, this ViT has not"
    if vision.pos_embed.shape[1] != vision.patch_embed.num_patches + 1:
        return "its class token has no position embedding, but BlipVisionModel's has one"
    block = vision.blocks[0]
    act = block.mlp.act
    if not isinstance(act, nn.GELU) or act.approximate != "none":
        return f"its ViT has the activation {type(act).__name__}, but BLIP has GELU"
    if block.attn.proj.in_features != vision.embed_dim:
        return "the heads of its ViT are wider than its width"
    if not vision.is_like_blips:
        return f"its image tower differs from BLIP's ViT ({vision.description})"
    return None


def med_config(config: BlipConfig, origin: str) -> MEDConfig:
    """Convert a BlipConfig to a MEDConfig.

    Raises:
        ValueError: the activation or the kind of position embedding is not BLIP's.
    """
    vision, text = config.vision_config, config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    positions = getattr(text, "position_embedding_type", "absolute")
    if acts != {"gelu"} or positions != "absolute":
        raise ValueError(
            f"{origin}: activations {', '.join(sorted(acts))} with {positions} positions; "
            "BLIP has gelu and absolute positions"
        )
    cls = getattr(text, "cls_token_id", None)
    return MEDConfig(
        VisionConfig(
            "vit_base_patch16_224",
            vision.image_size,
            {
                "patch_size": vision.patch_size,
                "embed_dim": vision.hidden_size,
                "depth": vision.num_hidden_layers,
                "num_heads": vision.num_attention_heads,
                "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            },
        ),
        TextConfig(
            SpecialTokens(
                pad=text.pad_token_id,
                cls=_PUBLISHED_CLS if cls is None else cls,  # RoBERTa's is 0
                sep=text.sep_token_id,
                enc=getattr(text, "enc_token_id", text.bos_token_id + 1),
                dec=text.bos_token_id,
            ),
            text.vocab_size,
            text.hidden_size,
            text.num_hidden_layers,
            text.num_attention_heads,
            text.intermediate_size,
            text.max_position_embeddings,
            norm_eps=text.layer_norm_eps,
        ),
        config.image_text_hidden_size,
    )
