"""SigLIP's contrastive loss: binary classification of each pair across all ranks' micro-batches.

SigLIP's scale is 1 / the MED's temperature. The bias is a parameter of this contrast.

Legend: B micro-batch of this rank, G pairs of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blip_scale.engine import collectives
from blip_scale.model.med import MED, MEDConfig
from blip_scale.objectives.contrastive import Similarities
from blip_scale.objectives.sigmoid import sigmoid_loss
from blip_scale.tasks.contrast import (
    Contrast,
    Contrasted,
    EncodedPairs,
    own_columns,
    same_images,
)


class Bias(nn.Module):
    """The learned bias of the similarities. It is a module because ZeRO-3 gathers by module."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), value))

    def forward(self) -> Tensor:
        """Return a copy of the bias, an fp32 scalar with gradient.

        ZeRO-3 releases the parameter itself after the forward.
        """
        return self.value.to(torch.float32, copy=True).squeeze(0)


class SigmoidNetwork(nn.Module):
    """Loss of this rank's images against the texts of all ranks."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = Bias(bias)

    def forward(self, pairs: EncodedPairs, inputs: Any) -> Contrasted:
        """Compute the mean loss over this rank's images.

        The mean over ranks is the loss of the global batch. Each pair counts once, on the rank of
        its image.
        """
        features = pairs.features
        texts_GE = collectives.all_gather_with_gradient(features.text)
        scores_BG = features.image @ texts_GE.T / pairs.temperature
        bias = self.bias()
        loss = sigmoid_loss(scores_BG + bias, same_images(pairs))
        scores_BB = own_columns(Similarities(scores_BG, scores_BG)).image_to_text
        return Contrasted(
            loss, Similarities(scores_BB, scores_BB.T), features, {"train/bias": bias.detach()}
        )


class SigmoidContrast(Contrast):
    """SigLIP's loss with a learned bias, without momentum encoders and queue."""

    exchanges = True

    def build_network(self, med: MED) -> SigmoidNetwork:
        """Build the loss and its bias."""
        return SigmoidNetwork(self.recipe.objective.sigmoid_bias)

    def initial_weights(self) -> dict[str, Tensor]:
        """Return the recipe's bias."""
        return {"bias.value": torch.tensor([self.recipe.objective.sigmoid_bias])}

    def key_count(self, batch_size: int) -> int:
        """Return the number of keys. Without gradient accumulation it is the global batch size."""
        return max(batch_size, self.recipe.train.global_batch_size)

    def flops(self, config: MEDConfig, batch_size: int, text_tokens: int) -> float:
        """Return the FLOPs of the similarities of images to texts."""
        return 3 * 2.0 * batch_size * self.key_count(batch_size) * config.embed_dim
