"""Interface of contrastive losses: `Contrast`, and the input and output of its network.

To add a loss, write a subclass in a new file and add an entry to `contrastive_task.CONTRASTS`.

Legend: B micro-batch of this rank, E embed_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blip_scale.config.recipe import Recipe
from blip_scale.engine import collectives
from blip_scale.engine.task import Progress
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.objectives.contrastive import FeaturePair, Similarities


@dataclass(frozen=True)
class EncodedPairs:
    """B image-text pairs and their features."""

    images: Tensor
    """[B, 3, H, W] normalised, in the type of the weights."""
    text: PackedText
    """B captions, first token [CLS]."""
    features: FeaturePair
    """Features [B, E] each, fp32, of norm 1, with gradient."""
    temperature: Tensor
    """Learned divisor of the similarities, an fp32 scalar with gradient."""
    image_ids: Tensor | None = None
    """[B] int64, equal for equal images. None: every pair counts as another image."""


@dataclass(frozen=True)
class Contrasted:
    """Output of a contrast's network."""

    loss: Tensor
    similarities: Similarities
    """Similarities whose first B columns are this rank's pairs."""
    keys: FeaturePair
    """Features [B, E] that the pairs' features are compared with. Pretraining uses them to draw
    hard negatives from all ranks, and `Contrast.collect` receives them."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for the log, by name."""


def of_all_ranks(features: FeaturePair) -> FeaturePair:
    """[B, E] each to [B x ranks, E], in rank order, without gradient. Call it on all ranks."""
    return FeaturePair(
        collectives.all_gather(features.image), collectives.all_gather(features.text)
    )


def gathered_with_gradient(features: FeaturePair) -> FeaturePair:
    """[B, E] each to [B x ranks, E], in rank order. The backward sums the gradients of all ranks.

    Data parallelism then takes the mean over ranks. If a rank's loss is the mean over its rows, the
    result is the gradient of the mean over the batch of all ranks.
    """
    return FeaturePair(
        collectives.all_gather_with_gradient(features.image),
        collectives.all_gather_with_gradient(features.text),
    )


def same_images(pairs: EncodedPairs) -> Tensor:
    """[B, B x ranks] bool: whether a pair of this rank and one of all ranks have the same image."""
    if pairs.image_ids is not None:
        return pairs.image_ids[:, None] == collectives.all_gather(pairs.image_ids)
    batch, device = len(pairs.features.image), pairs.features.image.device
    everyone = torch.arange(batch * collectives.world_size(), device=device)
    return own_rows(everyone, batch)[:, None] == everyone


def own_columns(similarities: Similarities) -> Similarities:
    """[B, B x ranks] both ways to the columns [B, B] of this rank."""
    batch = len(similarities.image_to_text)
    return Similarities(
        own_rows(similarities.image_to_text.T, batch).T,
        own_rows(similarities.text_to_image.T, batch).T,
    )


def own_rows(gathered: Tensor, batch: int) -> Tensor:
    """[B x ranks, ...] to the rows [B, ...] of this rank."""
    return gathered.narrow(0, collectives.rank() * batch, batch)


class Contrast(ABC):
    """A contrastive loss with its network, its state, and its update after each optimizer step.

    The state is kept outside the network, whose casts to bf16 would apply to buffers. A trainable
    parameter needs an entry in `initial_weights`, and a module whose forward returns tensors, so
    that ZeRO-3 gathers it (see `model.med.Temperature`).
    """

    momentum_pairs: dict[str, str]
    """Name of a parameter of the contrast's network -> name of the MED's parameter that it
    follows."""
    exchanges: ClassVar[bool] = False
    """Whether the network's forward exchanges tensors between ranks."""

    def __init__(
        self, recipe: Recipe, config: MEDConfig, device: torch.device, knows_images: bool
    ) -> None:
        """Make the state.

        Args:
            recipe: the recipe, whose `objective` holds the settings.
            config: sizes of the MED.
            device: device of this rank.
            knows_images: whether pairs have `image_ids`.
        """
        self.recipe, self.config = recipe, config
        self.momentum_pairs = {}

    @abstractmethod
    def build_network(self, med: MED) -> nn.Module:
        """The contrast's network, with unset weights. It may share frozen parameters of the MED.

        It is a module that maps `EncodedPairs` and the result of `inputs` to `Contrasted`, without
        side effects.
        """

    @abstractmethod
    def flops(self, config: MEDConfig, batch_size: int, text_tokens: int) -> float:
        """FLOPs that the contrast adds to a micro-step, forward and backward.

        `config` may have another image size than the contrast's.
        """

    def key_count(self, batch_size: int) -> int:
        """Number of keys that each pair of a micro-batch is compared with, for plans of memory."""
        return batch_size

    def initial_weights(self) -> dict[str, Tensor]:
        """All trainable parameters of the contrast's network by name, in fp32 on the CPU.

        They must be equal on all ranks.
        """
        return {}

    def inputs(self, progress: Progress) -> Any:
        """State and scheduled values that the contrast's network reads in a micro-step."""
        return None

    # A contrast without state leaves these three as they are.
    def collect(  # noqa: B027
        self, keys: FeaturePair, image_ids: Tensor | None, step: int
    ) -> None:
        """Keep the keys of a micro-step of optimizer step `step`, for `after_step`."""

    def after_step(  # noqa: B027
        self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool
    ) -> None:
        """Update the state after an optimizer step. Called on all ranks.

        If the update was skipped, `applied` is False, and only the collected keys are dropped.
        """

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Metrics for a line of the log. Called on all ranks."""
        return {}

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able state, and tensors that are equal on all ranks."""
        return {}, {}

    def load_state_dict(  # noqa: B027
        self, state: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Restore the state that `state_dict` returned. Other entries are ignored."""
