"""SigLIP's contrastive loss: binary classification of each pair (Zhai et al. 2023).

Legend: B images of this rank, G texts of all ranks. Everything is computed in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(logits_BG: Tensor, matches_BG: Tensor) -> Tensor:
    """Sum log(1 + exp(-z * logit)) over each row and average over the rows; fp32 scalar.

    z is 1 for a match and -1 for a mismatch.

    Args:
        logits_BG: similarities divided by the temperature, plus the bias.
        matches_BG: bool, pairs of the same image.
    """
    signs_BG = torch.where(matches_BG, 1.0, -1.0)
    return -F.logsigmoid(signs_BG * logits_BG).sum(dim=1).mean()
