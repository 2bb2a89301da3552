"""The recipe's network in sizes alone: nothing is allocated, nothing is fetched from a hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from blip_scale.config.recipe import Recipe, TextRecipe
from blip_scale.data.tokenizer import load_tokenizer, resolve_checkpoint
from blip_scale.inference.sizes import Vocabulary, checkpoint_sizes, network_config
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.text import SpecialTokens
from blip_scale.model.vision import VisionConfig, build_vision, training_tokens

_PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {},
    "bert-large-uncased": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
}
"""Sizes of text checkpoints that need not be here for a plan; TextConfig's defaults are base."""
_PUBLISHED_VOCABULARY = Vocabulary(
    SpecialTokens(pad=0, cls=101, sep=102, enc=30523, dec=30522), size=30524
)
"""Vocabulary that these checkpoints share."""


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


class PlannedContrast(Protocol):
    """What a plan asks of the contrast that `objective.itc` names; `tasks.contrast.Contrast` has
    it. Rooms below the tasks do not import them, so callers hand it in."""

    def build_network(self) -> nn.Module:
        """Its part of the network, weights not filled."""

    def flops(self, batch_size: int, text_tokens: int) -> float:
        """Floating-point operations that it adds to a micro-step, forward and backward."""

    def key_count(self, batch_size: int) -> int:
        """Features that each pair of a micro-batch is compared with."""

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able state, and tensors."""


ContrastOf: TypeAlias = Callable[[Recipe, MEDConfig], PlannedContrast]
"""Makes a recipe's contrast on the meta device, where its state takes no memory."""


@dataclass(frozen=True)
class Network:
    """Configuration and parameter sizes, the contrast's part included."""

    config: MEDConfig
    vision: VisionShape
    contrast: PlannedContrast
    trainable: list[int]
    """Elements of each trainable parameter."""
    frozen: list[int]
    """Elements of each parameter of the MED that doesn't train; each has a momentum copy."""
    momentum: list[int]
    """Elements of each parameter of the momentum copies; empty for a contrast without them."""
    largest_module: int
    """Elements of the parameters of the largest module that is gathered at once."""
    module_parameters: list[int]
    """Elements of the largest parameter of each module with parameters of its own."""
    notes: list[str]

    @property
    def modules(self) -> int:
        """Modules with parameters of their own, the momentum copies' among them."""
        return len(self.module_parameters)

    @property
    def contrast_bytes(self) -> float:
        """Bytes of the contrast's state: for BLIP the queues."""
        return float(sum(tensor.nbytes for tensor in self.contrast.state_dict()[1].values()))


def network_of(recipe: Recipe, contrast_of: ContrastOf) -> Network:
    """Sizes of a recipe's network.

    Args:
        contrast_of: makes the contrast that the recipe names.

    Raises:
        ValueError: a ViT that timm does not know, a contrast that there is not, or a text
            checkpoint or tokenizer whose sizes are not known.
        FileNotFoundError: a checkpoint folder or package that is not there.
    """
    notes: list[str] = []
    text = recipe.model.text
    config = network_config(recipe, _text_sizes(text, notes), _vocabulary(text))
    contrast = contrast_of(recipe, config)
    with torch.device("meta"):
        med, beside = MED(config), contrast.build_network()
    owners = [module for module in [*med.modules(), *beside.modules()] if _own(module)]
    trainable = [p.numel() for p in med.parameters() if p.requires_grad]
    return Network(
        config,
        vision_shape(config.vision),
        contrast,
        trainable + [p.numel() for p in beside.parameters() if p.requires_grad],
        [p.numel() for p in med.parameters() if not p.requires_grad],
        [p.numel() for p in beside.parameters() if not p.requires_grad],
        max(map(_own, owners)),
        [max(p.numel() for p in module.parameters(recurse=False)) for module in owners],
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


def _text_sizes(text: TextRecipe, notes: list[str]) -> dict[str, Any] | None:
    """Sizes of the text checkpoint, from its folder or as published; None without one."""
    if text.checkpoint is None:
        return None
    where = resolve_checkpoint(text.checkpoint)
    if Path(where).is_dir():
        return checkpoint_sizes(text.checkpoint)
    if where not in _PUBLISHED_SIZES:
        raise ValueError(
            f"model.text.checkpoint {text.checkpoint}: its sizes are known only where it is a "
            f"folder or one of {', '.join(_PUBLISHED_SIZES)}; fetch it and give the folder"
        )
    notes.append(f"text sizes are those published of {where}")
    return _PUBLISHED_SIZES[where]


def _vocabulary(text: TextRecipe) -> Vocabulary:
    """Vocabulary of the recipe's tokenizer, from its folder or as published."""
    name = text.tokenizer or text.checkpoint
    where = resolve_checkpoint(name) if name else None
    if where in _PUBLISHED_SIZES:
        return _PUBLISHED_VOCABULARY
    if where is not None and not Path(where).is_dir():
        raise ValueError(
            f"model.text.tokenizer {name}: a plan fetches nothing; give a folder, or one of "
            f"{', '.join(_PUBLISHED_SIZES)}"
        )
    return Vocabulary.of(load_tokenizer(text))  # refuses a recipe that names none
