"""Sizes of a recipe's network, computed without allocating weights or fetching files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from blip_scale.config.model_recipe import TextRecipe
from blip_scale.config.recipe import Recipe
from blip_scale.data.tokenizer import load_tokenizer, resolve_checkpoint
from blip_scale.inference.sizes import Vocabulary, checkpoint_sizes, limited, network_config
from blip_scale.model.heads import cut_down, freeze_unread
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.text import SpecialTokens
from blip_scale.model.vision import VisionConfig, build_vision, training_tokens

_PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {},
    "bert-large-uncased": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
}
"""Sizes of known text checkpoints, as differences from BERT-base, TextConfig's default."""
_PUBLISHED_VOCABULARY = Vocabulary(
    SpecialTokens(pad=0, cls=101, sep=102, enc=30523, dec=30522), size=30524
)
"""Common vocabulary of these checkpoints."""


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the ViT."""

    image_size: int
    tokens: int
    """Number of tokens in training, after patch dropout."""
    width: int
    depth: int
    trained_depth: int
    """Number of blocks that are not frozen."""
    heads: int
    mlp_width: int


class PlannedContrast(Protocol):
    """Interface of a contrastive task part for a plan; `tasks.contrast.Contrast` implements it.

    This package may not import `tasks`, so callers pass the contrast in.
    """

    exchanges: ClassVar[bool]
    """Whether the network's forward exchanges features between ranks."""

    def build_network(self, med: MED) -> nn.Module:
        """Build the contrast's network, uninitialised. It may share the MED's frozen parameters."""

    def flops(self, config: MEDConfig, batch_size: int, text_tokens: int) -> float:
        """FLOPs that the contrast adds to a micro-step, forward and backward."""

    def key_count(self, batch_size: int) -> int:
        """Number of features with which each pair of a micro-batch is compared."""

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the JSON-able state and the tensors."""


ContrastOf: TypeAlias = Callable[[Recipe, MEDConfig], PlannedContrast]
"""Function that creates a recipe's contrast on the meta device, where it takes no memory."""


@dataclass(frozen=True)
class Network:
    """Configuration and parameter sizes, including the contrast."""

    config: MEDConfig
    vision: VisionShape
    contrast: PlannedContrast
    trainable: list[int]
    """Number of elements of each trainable parameter."""
    frozen: list[int]
    """Number of elements of each frozen parameter of the MED. They have no momentum copies."""
    momentum: list[int]
    """Number of elements of each momentum copy; empty if the contrast has none."""
    largest_module: int
    """Number of elements of the largest module, which is gathered at once."""
    module_parameters: list[int]
    """Number of elements of the largest parameter of each module that holds parameters."""
    notes: list[str]
    swept: int = 0
    """Maximum number of elements of frozen parameters that the backward pass reads."""
    decodes: bool = True
    """Whether LM is trained."""
    matches: bool = True
    """Whether ITM is trained."""

    @property
    def modules(self) -> int:
        """Number of modules that hold parameters, including momentum copies."""
        return len(self.module_parameters)

    @property
    def contrast_bytes(self) -> float:
        """Bytes of the contrast's state (for BLIP, the queues)."""
        return float(sum(tensor.nbytes for tensor in self.contrast.state_dict()[1].values()))


def network_of(recipe: Recipe, contrast_of: ContrastOf) -> Network:
    """Sizes of a recipe's network.

    Args:
        recipe: the recipe.
        contrast_of: creates the recipe's contrast.

    Raises:
        ValueError: timm doesn't have the ViT, the contrast doesn't exist, or the sizes of the text
            checkpoint or tokenizer are unknown.
        FileNotFoundError: a checkpoint folder or package doesn't exist.
    """
    notes: list[str] = []
    text = recipe.model.text
    config = network_config(recipe, _text_sizes(text, notes), _vocabulary(text))
    contrast = contrast_of(recipe, config)
    decodes, matches = recipe.objective.lm != "none", recipe.objective.itm != "none"
    with torch.device("meta"):
        med = MED(config)
        med = limited(med if decodes else cut_down(med, "retrieval"), recipe.model)
        swept = _swept(med, recipe)
        med = freeze_unread(med, matches, decodes)
        contrast_network = contrast.build_network(med)
    owners = [
        module for module in [*med.modules(), *contrast_network.modules()] if _elements(module)
    ]
    trainable = [p.numel() for p in med.parameters() if p.requires_grad]
    shared = set(med.parameters())
    return Network(
        config,
        vision_shape(config.vision),
        contrast,
        trainable + [p.numel() for p in contrast_network.parameters() if p.requires_grad],
        [p.numel() for p in med.parameters() if not p.requires_grad],
        [
            p.numel()
            for p in contrast_network.parameters()
            if not p.requires_grad and p not in shared
        ],
        max(map(_elements, owners)),
        [max(p.numel() for p in module.parameters(recurse=False)) for module in owners],
        notes,
        swept,
        decodes,
        matches,
    )


def _swept(med: MED, recipe: Recipe) -> int:
    """Number of elements of frozen parameters through which gradients flow to trained ones.

    They are the text layers, and the ViT blocks from the first one with adapters on.
    """
    lora, first_block = recipe.model.lora, recipe.model.vision.frozen_layers
    has_adapters = lora.rank > 0 and "vision" in lora.targets
    elements = 0
    for name, parameter in med.named_parameters():
        if parameter.requires_grad:
            continue
        in_block = name.startswith("vision.blocks.") and int(name.split(".")[2]) >= first_block
        if name.startswith("text.layers.") or (has_adapters and in_block):
            elements += parameter.numel()
    return elements


def vision_shape(config: VisionConfig) -> VisionShape:
    """Sizes of a ViT."""
    with torch.device("meta"):
        vision = build_vision(config)
    return VisionShape(
        config.image_size,
        training_tokens(vision),
        vision.embed_dim,
        len(vision.blocks),
        0 if config.frozen else len(vision.blocks) - config.frozen_layers,
        vision.heads,
        vision.mlp_width,
    )


def _elements(module: nn.Module) -> int:
    """Number of elements of a module's own parameters, without those of its children."""
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _text_sizes(text: TextRecipe, notes: list[str]) -> dict[str, Any] | None:
    """Sizes of the text checkpoint, from its folder or known; None without a checkpoint."""
    if text.checkpoint is None:
        return None
    where = resolve_checkpoint(text.checkpoint)
    if Path(where).is_dir():
        return checkpoint_sizes(text.checkpoint)
    if where not in _PUBLISHED_SIZES:
        raise ValueError(
            f"model.text.checkpoint {text.checkpoint}: its sizes are unknown: it is neither a "
            f"folder nor one of {', '.join(_PUBLISHED_SIZES)}; fetch it and give the folder"
        )
    notes.append(f"text sizes are the published ones of {where}")
    return _PUBLISHED_SIZES[where]


def _vocabulary(text: TextRecipe) -> Vocabulary:
    """Vocabulary of the recipe's tokenizer, from its folder or known."""
    name = text.tokenizer or text.checkpoint
    where = resolve_checkpoint(name) if name else None
    if where in _PUBLISHED_SIZES:
        return _PUBLISHED_VOCABULARY
    if where is not None and not Path(where).is_dir():
        raise ValueError(
            f"model.text.tokenizer {name}: a plan fetches no files; give a folder, or one of "
            f"{', '.join(_PUBLISHED_SIZES)}"
        )
    return Vocabulary.of(load_tokenizer(text))  # raises an error for a recipe without a tokenizer
