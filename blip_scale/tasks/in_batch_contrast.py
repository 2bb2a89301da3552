"""CLIP's contrastive loss: a softmax over the micro-batches of all ranks. It has no state.

Legend: B micro-batch of this rank, G pairs of all ranks.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from blip_scale.model.med import MED, MEDConfig
from blip_scale.objectives.contrastive import Similarities
from blip_scale.objectives.in_batch import in_batch_loss
from blip_scale.tasks.contrast import (
    Contrast,
    Contrasted,
    EncodedPairs,
    gathered_with_gradient,
    own_columns,
    same_images,
)


class InBatchNetwork(nn.Module):
    """Loss of this rank's pairs against the features of all ranks."""

    def forward(self, pairs: EncodedPairs, inputs: Any) -> Contrasted:
        """Compute the mean loss over this rank's rows. The mean over ranks is the batch's loss."""
        features, temperature = pairs.features, pairs.temperature
        keys = gathered_with_gradient(features)
        similarities = Similarities(
            features.image @ keys.text.T / temperature, features.text @ keys.image.T / temperature
        )
        loss = in_batch_loss(similarities, same_images(pairs))
        return Contrasted(loss, own_columns(similarities), features)


class InBatchContrast(Contrast):
    """CLIP's loss, without momentum encoders and queue."""

    exchanges = True

    def build_network(self, med: MED) -> InBatchNetwork:
        """Build the loss, which has no weights."""
        return InBatchNetwork()

    def key_count(self, batch_size: int) -> int:
        """Return the number of keys. Without gradient accumulation it is the global batch size."""
        return max(batch_size, self.recipe.train.global_batch_size)

    def flops(self, config: MEDConfig, batch_size: int, text_tokens: int) -> float:
        """Return the FLOPs of the similarities in both directions."""
        products = 2 * batch_size * self.key_count(batch_size)
        return 3 * 2.0 * products * config.embed_dim
