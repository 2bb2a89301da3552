"""CLIP's contrastive loss: a softmax over all pairs of the batch (Radford et al. 2021).

Legend: B pairs of this rank, G pairs of all ranks. Everything is computed in fp32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blip_scale.objectives.contrastive import Similarities


def in_batch_loss(similarities: Similarities, matches_BG: Tensor) -> Tensor:
    """Compute the cross entropy of the matches, mean over rows and directions; fp32 scalar.

    Args:
        similarities: [B, G] in both directions, divided by the temperature, with gradient.
        matches_BG: bool, pairs of the same image. If a row has several, the target is spread
            evenly over them.
    """
    targets_BG = matches_BG / matches_BG.sum(dim=1, keepdim=True)
    image_to_text = F.cross_entropy(similarities.image_to_text, targets_BG)
    text_to_image = F.cross_entropy(similarities.text_to_image, targets_BG)
    return (image_to_text + text_to_image) / 2
