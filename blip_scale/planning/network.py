"""The recipe's network in sizes alone: nothing is allocated, nothing is fetched from a hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip_scale.config.recipe import Recipe, TextRecipe
from blip_scale.data.tokenizer import load_tokenizer, resolve_checkpoint
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig, build_vision, training_tokens

_KNOWN: dict[str, dict[str, int]] = {
    "bert-base-uncased": {},
    "bert-large-uncased": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
}
"""Sizes of text checkpoints that need not be here for a plan; TextConfig's defaults are base."""


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the ViT."""

    image_size: int
    tokens: int
    """In training, as patch dropout leaves them."""
    width: int
    depth: int
    trained_depth: int
    """Blocks that aren't frozen."""
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class Network:
    """Configuration and parameter sizes."""

    config: MEDConfig
    vision: VisionShape
    trainable: list[int]
    """Elements of each trainable parameter."""
    frozen: list[int]
    """Elements of each parameter of the network that doesn't train; each has a momentum copy."""
    momentum: list[int]
    """Elements of each parameter of the momentum copies."""
    largest_module: int
    """Elements of the parameters of the largest module that is gathered at once."""
    modules: int
    """Modules with parameters of their own, in the network and the momentum copies together."""
    notes: list[str]


def network_of(recipe: Recipe) -> Network:
    """Sizes of a recipe's network.

    Raises:
        ValueError: a ViT that timm does not know, or a text checkpoint whose sizes are not known.
        FileNotFoundError: a checkpoint folder or package that is not there.
    """
    vision = recipe.model.vision
    notes: list[str] = []
    text = _text_config(recipe.model.text, notes)
    vision_config = VisionConfig(
        vision.name, vision.image_size, vision.overrides, vision.drop_path_rate,
        vision.patch_dropout, vision.frozen_layers,
    )  # fmt: skip
    config = MEDConfig(
        vision_config, text, recipe.model.embed_dim,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
    )  # fmt: skip
    with torch.device("meta"):
        med, momentum = MED(config), MomentumEncoder(config)
    owners = [module for module in [*med.modules(), *momentum.modules()] if _own(module)]
    return Network(
        config,
        vision_shape(vision_config),
        [parameter.numel() for parameter in med.parameters() if parameter.requires_grad],
        [parameter.numel() for parameter in med.parameters() if not parameter.requires_grad],
        [parameter.numel() for parameter in momentum.parameters()],
        max(map(_own, owners)),
        len(owners),
        notes,
    )


def vision_shape(config: VisionConfig) -> VisionShape:
    """Sizes of a ViT."""
    with torch.device("meta"):
        vision = build_vision(config)
    block: Any = vision.blocks[0]
    return VisionShape(
        config.image_size,
        training_tokens(vision),
        vision.embed_dim,
        len(vision.blocks),
        len(vision.blocks) - config.frozen_layers,
        block.attn.num_heads,
        block.mlp.fc1.out_features,
    )


def _own(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _text_config(text: TextRecipe, notes: list[str]) -> TextConfig:
    sizes: dict[str, Any] = {
        "width": text.width, "layers": 12, "heads": text.heads, "mlp_width": text.mlp_width,
    }  # fmt: skip
    if text.checkpoint is not None:
        where = resolve_checkpoint(text.checkpoint)
        file = Path(where) / "config.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            sizes = {
                "width": found["hidden_size"],
                "layers": found["num_hidden_layers"],
                "heads": found["num_attention_heads"],
                "mlp_width": found["intermediate_size"],
                "max_positions": found["max_position_embeddings"],
            }
            vocabulary = found["vocab_size"] + 2
        elif where in _KNOWN:
            sizes, vocabulary = dict(_KNOWN[where]), TextConfig.vocab_size
            notes.append(f"text sizes are those published of {where}")
        else:
            raise ValueError(
                f"model.text.checkpoint {text.checkpoint}: its sizes are known only where it is a "
                f"folder or one of {', '.join(_KNOWN)}; fetch it and give the folder"
            )
    if text.tokenizer is not None:
        vocabulary = len(load_tokenizer(text))
    if text.layers is not None:
        sizes["layers"] = text.layers
    special = SpecialTokens(pad=0, cls=1, sep=2, enc=vocabulary - 1, dec=vocabulary - 2)
    return TextConfig(special, vocabulary, dropout=text.dropout, **sizes)
