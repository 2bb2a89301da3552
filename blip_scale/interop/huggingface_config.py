"""Hugging Face's BlipConfig and our MEDConfig, both ways, and what theirs can't express.

Their config must be told BLIP's published sizes: vision layer_norm_eps 1e-6 (their default is 1e-5)
and the number of text heads (their default is 8).
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
from blip_scale.model.vision import NORM_EPS, VisionConfig, build_vision

if TYPE_CHECKING:
    from transformers import BlipConfig, BlipTextConfig

CLASSES: dict[Head, str] = {
    "captioning": "BlipForConditionalGeneration",
    "retrieval": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
}
_PUBLISHED_CLS = 101


def blip_config(weights: BlipWeights) -> BlipConfig:
    """Their config of this network; temperature, steps and output settings are extra entries."""
    from transformers import BlipConfig, BlipVisionConfig

    config, text = weights.config, weights.config.text
    with torch.device("meta"):
        vit = build_vision(config.vision)
    vision = BlipVisionConfig(
        hidden_size=vit.embed_dim,
        intermediate_size=vit.blocks[0].mlp.fc1.out_features,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.blocks[0].attn.num_heads,
        image_size=config.vision.image_size,
        patch_size=vit.patch_embed.patch_size[0],
        hidden_act="gelu",
        layer_norm_eps=NORM_EPS,
        initializer_range=0.02,  # theirs is 1e-10, useless where anybody trains from scratch
    )
    theirs = text_config(text, vit.embed_dim)
    output = replace(weights.output_settings, scoring="huggingface")  # as its readers score
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
        text_config=theirs.to_dict(),
        vision_config=vision.to_dict(),
        image_text_hidden_size=config.embed_dim,
        architectures=[CLASSES[weights.head]],
        dtype="float32",
        **extra,
    )


def text_config(text: TextConfig, image_width: int) -> BlipTextConfig:
    """Their config of this text stack, which looks at image tokens of a width."""
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
        eos_token_id=special.sep,  # theirs is 2, at which nothing ever stops
        sep_token_id=special.sep,
        pad_token_id=special.pad,
        cls_token_id=special.cls,
        enc_token_id=special.enc,
        is_decoder=True,
    )


def inexpressible(weights: BlipWeights) -> str | None:
    """Why their BlipVisionModel or BlipTextModel isn't this network, if so."""
    if weights.head not in CLASSES:
        known = ", ".join(CLASSES)
        return f"transformers has no such class; give --head: one of {known}"
    with torch.device("meta"):
        vit = build_vision(weights.config.vision)
    strange = sorted({name for name in vit.state_dict() if their_vision(name) is None})
    if strange:
        kinds = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in strange})
        return f"BlipVisionModel has nothing for {', '.join(kinds[:4])} of this ViT"
    wanted = {*VISION, *(f"blocks.0.{name}" for name in VISION_BLOCK)}
    plain = {"cls_token", "pos_embed"}
    names = {n for w in wanted for n in ((w,) if w in plain else (f"{w}.weight", f"{w}.bias"))}
    absent = sorted(names - set(vit.state_dict()))
    if absent:
        return f"BlipVisionModel has {absent[0]}, this ViT has not"
    block = vit.blocks[0]
    positions = vit.patch_embed.num_patches + 1
    if vit.pos_embed.shape[1] != positions:
        return "its class token has no position embedding, BlipVisionModel's has"
    act = block.mlp.act
    if not isinstance(act, nn.GELU) or act.approximate != "none":
        return f"its ViT has the activation {type(act).__name__}, BLIP has GELU"
    if block.attn.num_heads * block.attn.head_dim != vit.embed_dim:
        return "the heads of its ViT are wider than its width"
    if weights.head == "vqa" and weights.config.text.width != vit.embed_dim:
        return (
            f"BlipForQuestionAnswering has one width for what encoder and decoder read; here these "
            f"are {vit.embed_dim} (image tokens) and {weights.config.text.width} (question states)"
        )
    return None


def med_config(theirs: BlipConfig, origin: str) -> MEDConfig:
    """Sizes of one of their configs; raises ValueError for activations that BLIP hasn't."""
    vision, text = theirs.vision_config, theirs.text_config
    acts = {vision.hidden_act, text.hidden_act}
    positions = getattr(text, "position_embedding_type", "absolute")
    if acts != {"gelu"} or positions != "absolute":
        raise ValueError(
            f"{origin}: activations {', '.join(sorted(acts))} with {positions} positions; "
            "BLIP has gelu and absolute positions"
        )
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
                cls=getattr(text, "cls_token_id", None) or _PUBLISHED_CLS,
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
        theirs.image_text_hidden_size,
    )
