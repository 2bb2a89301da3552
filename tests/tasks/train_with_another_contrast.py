"""train.py with a second contrast, `in_batch`: SigLIP's loss on the pairs of a micro-batch, with a
learned bias, without momentum encoders and without a queue.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.objectives.contrastive import Similarities
from blip_scale.tasks.contrast import Contrast, Contrasted, EncodedPairs
from blip_scale.tasks.contrastive_task import CONTRASTS

BIAS = -1.5


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), BIAS))

    def forward(self) -> Tensor:
        return self.value.to(torch.float32, copy=True)


class InBatchNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = Bias()

    def forward(self, pairs: EncodedPairs, inputs: Any) -> Contrasted:
        scores_BB = pairs.features.image @ pairs.features.text.T / pairs.temperature
        matches_BB = torch.eye(len(scores_BB), dtype=torch.bool, device=scores_BB.device)
        if pairs.image_ids is not None:
            matches_BB = pairs.image_ids[:, None] == pairs.image_ids
        logits_BB = scores_BB + self.bias()
        loss = F.binary_cross_entropy_with_logits(logits_BB, matches_BB.float())
        return Contrasted(loss, Similarities(scores_BB, scores_BB.T), pairs.features)


class InBatch(Contrast):
    def build_network(self) -> InBatchNetwork:
        return InBatchNetwork()

    def initial_weights(self) -> dict[str, Tensor]:
        return {"bias.value": torch.tensor([BIAS])}

    def flops(self, batch_size: int, text_tokens: int) -> float:
        return 3 * 2.0 * batch_size**2 * self.config.embed_dim


if __name__ == "__main__":
    CONTRASTS["in_batch"] = InBatch
    train.command()
