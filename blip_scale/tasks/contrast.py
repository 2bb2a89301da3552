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
    """[B, 3, H, W] normalised, in the dtype of the weights."""
    text: PackedText
    """B captions. The first token is [CLS]."""
    features: FeaturePair
    """Features [B, E] each, fp32, L2-normalised, with gradient."""
    temperature: Tensor
    """Learned divisor of the similarities, an fp32 scalar with gradient."""
    image_ids: Tensor | None = None
    """Image id of each pair, [B] int64. None: all images are different."""


@dataclass(frozen=True)
class Contrasted:
    """Output of a contrast's network."""

    loss: Tensor
    similarities: Similarities
    """Scaled similarities. The first B columns are this rank's pairs."""
    keys: FeaturePair
    """Features [B, E] that the pairs' features are compared with. With global ITM, pretraining
    draws hard negatives from all ranks with them. `Contrast.collect` also receives them."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for the log, by name."""


def of_all_ranks(features: FeaturePair) -> FeaturePair:
    """Gather [B, E] each to [B x ranks, E], in rank order, without gradient. Call on all ranks."""
    return FeaturePair(
        collectives.all_gather(features.image), collectives.all_gather(features.text)
    )


def gathered_with_gradient(features: FeaturePair) -> FeaturePair:
    """Gather [B, E] each to [B x ranks, E], in rank order, with gradient.

    The backward sums the gradients of all ranks, then data parallelism averages over ranks. If a
    rank's loss is the mean over its rows, the result is the gradient of the mean over the global
    batch.
    """
    return FeaturePair(
        collectives.all_gather_with_gradient(features.image),
        collectives.all_gather_with_gradient(features.text),
    )


def same_images(pairs: EncodedPairs) -> Tensor:
    """Compare the images of this rank's pairs with those of all ranks, [B, B x ranks] bool."""
    if pairs.image_ids is not None:
        return pairs.image_ids[:, None] == collectives.all_gather(pairs.image_ids)
    batch, device = len(pairs.features.image), pairs.features.image.device
    everyone = torch.arange(batch * collectives.world_size(), device=device)
    return own_rows(everyone, batch)[:, None] == everyone


def own_columns(similarities: Similarities) -> Similarities:
    """Select this rank's columns [B, B] from [B, B x ranks], in both directions."""
    batch = len(similarities.image_to_text)
    return Similarities(
        own_rows(similarities.image_to_text.T, batch).T,
        own_rows(similarities.text_to_image.T, batch).T,
    )


def own_rows(gathered: Tensor, batch: int) -> Tensor:
    """Select this rank's rows [B, ...] from [B x ranks, ...]."""
    return gathered.narrow(0, collectives.rank() * batch, batch)


class Contrast(ABC):
    """A contrastive loss with its network, its state, and the update after each optimizer step.

    Keep the state outside the network: casting the network to bf16 would also cast its buffers. A
    trainable parameter needs an entry in `initial_weights`. It must belong to a module whose
    forward returns tensors, so that ZeRO-3 gathers it (see `model.med.Temperature`).
    """

    momentum_pairs: dict[str, str]
    """Parameter of the contrast's network -> parameter of the MED whose moving average it is."""
    exchanges: ClassVar[bool] = False
    """Whether the network's forward communicates between ranks."""

    def __init__(
        self, recipe: Recipe, config: MEDConfig, device: torch.device, knows_images: bool
    ) -> None:
        """Create the state.

        Args:
            recipe: settings of the run. Those of the loss are in `objective`.
            config: sizes of the MED.
            device: device of this rank.
            knows_images: whether pairs have `image_ids`.
        """
        self.recipe, self.config = recipe, config
        self.momentum_pairs = {}

    @abstractmethod
    def build_network(self, med: MED) -> nn.Module:
        """Build the contrast's network, with unset weights.

        The module maps `EncodedPairs` and the result of `inputs` to `Contrasted`, without side
        effects. It may share frozen parameters of the MED.
        """

    @abstractmethod
    def flops(self, config: MEDConfig, batch_size: int, text_tokens: int) -> float:
        """Return the FLOPs that the contrast adds to a micro-step, forward and backward.

        The image size of `config` may differ from that of `self.config`.
        """

    def key_count(self, batch_size: int) -> int:
        """Return the number of keys that each pair is compared with, to plan memory."""
        return batch_size

    def initial_weights(self) -> dict[str, Tensor]:
        """Return all trainable parameters of the network by name, in fp32 on the CPU.

        They must be equal on all ranks.
        """
        return {}

    def inputs(self, progress: Progress) -> Any:
        """Return the state and scheduled values that the network reads in a micro-step."""
        return None

    # `collect`, `after_step` and `load_state_dict` do nothing in a contrast without state.
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
        """Return metrics for a line of the log. Called on all ranks."""
        return {}

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return JSON-able state, and tensors that are equal on all ranks."""
        return {}, {}

    def load_state_dict(  # noqa: B027
        self, state: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Restore the state that `state_dict` returned. Other entries are ignored."""
