"""What a contrastive loss is to the tasks that hold one: `Contrast`, and what goes into and out of
its part of the network.

A second loss is a subclass in a file of its own and an entry in `contrastive_task.CONTRASTS`.

Legend: B micro-batch of this rank, E embed_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blip_scale.config.recipe import Recipe
from blip_scale.engine import collectives
from blip_scale.engine.task import Progress
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.model.med import MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.objectives.contrastive import FeaturePair, Similarities


@dataclass(frozen=True)
class EncodedPairs:
    """B image-text pairs and what the MED makes of them."""

    images: Tensor
    """[B, 3, H, W] normalised, in the type of the weights."""
    text: PackedText
    """B captions, first token [CLS]."""
    features: FeaturePair
    """[B, E] each, fp32, of norm 1, with gradient."""
    temperature: Tensor
    """Learned divisor of the similarities, a fp32 scalar with gradient."""
    image_ids: Tensor | None = None
    """[B] int64, equal where the image is the same; None: every pair counts as another image."""


@dataclass(frozen=True)
class Contrasted:
    """Output of a contrast's part of the network."""

    loss: Tensor
    similarities: Similarities
    """Their first B columns are this rank's own pairs."""
    keys: FeaturePair
    """Features [B, E] that the pairs' features are compared with; pretraining draws the hard
    negatives of all ranks by them, and `Contrast.collect` receives them."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for the log, by name."""


def of_all_ranks(features: FeaturePair) -> FeaturePair:
    """[B, E] each to [B x ranks, E], in rank order and without gradient; all ranks call."""
    return FeaturePair(
        collectives.all_gather(features.image), collectives.all_gather(features.text)
    )


class Contrast(ABC):
    """A contrastive loss with all that belongs to it: its part of the network, its state, and its
    update after each optimizer step.

    The state lives outside of the network: buffers would follow its casts to bf16. A parameter that
    trains needs an entry in `initial_weights`, and a module of its own whose forward returns
    tensors, so that ZeRO-3 gathers it (see `model.med.Temperature`).
    """

    momentum_pairs: dict[str, str]
    """Parameter of the contrast's network -> parameter of the MED that it follows."""

    def __init__(
        self, recipe: Recipe, config: MEDConfig, device: torch.device, knows_images: bool
    ) -> None:
        """Make the state.

        Args:
            recipe: its `objective` holds the settings.
            config: sizes of the MED.
            device: of this rank.
            knows_images: whether pairs come with `image_ids`.
        """
        self.recipe, self.config = recipe, config
        self.momentum_pairs = {}

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Its part of the network, weights not filled: a module that maps `EncodedPairs` and
        `inputs` to `Contrasted`, without any side effect."""

    @abstractmethod
    def flops(self, batch_size: int, text_tokens: int) -> float:
        """Floating-point operations that it adds to a micro-step, forward and backward."""

    def key_count(self, batch_size: int) -> int:
        """Features that each pair of a micro-batch of this rank is compared with; a plan counts
        memory by it."""
        return batch_size

    def initial_weights(self) -> dict[str, Tensor]:
        """Every trainable parameter of its network by name, in fp32 on the CPU, equal on all
        ranks."""
        return {}

    def inputs(self, progress: Progress) -> Any:
        """What its network reads of state and schedule in a micro-step."""
        return None

    # A contrast without state leaves these three as they are.
    def collect(  # noqa: B027
        self, keys: FeaturePair, image_ids: Tensor | None, step: int
    ) -> None:
        """Take the keys of a micro-step of optimizer step `step`, for `after_step`."""

    def after_step(  # noqa: B027
        self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool
    ) -> None:
        """Update the state after an optimizer step; all ranks call.

        `applied` is False when the update was skipped; then only what was collected is dropped.
        """

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Figures for a line of the log; all ranks call."""
        return {}

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able state, and tensors that are equal on all ranks."""
        return {}, {}

    def load_state_dict(  # noqa: B027
        self, state: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Restore the state from what `state_dict` gave; other entries are ignored."""
