"""Language modelling loss (LM) of the image-grounded decoder.

Legend: P predicted positions, V vocabulary. Every token of a sequence except the last predicts the
next token. Fillers predict nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blip_scale.model.packing import IGNORED


def lm_loss(logits_PV: Tensor, targets_P: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Compute the label-smoothed cross entropy, mean over this rank's tokens; fp32 scalar.

    The loss of a token is (1 - s) * -log p(target) + s * mean over the vocabulary of -log p. With
    s = 0.1, as published (Li et al. 2022, section 3.2), it cannot reach 0.

    Args:
        logits_PV: any floating type; the softmax is computed in fp32.
        targets_P: token ids int64, or `IGNORED`.
        label_smoothing: s.
    """
    return F.cross_entropy(
        logits_PV.float(), targets_P, ignore_index=IGNORED, label_smoothing=label_smoothing
    )
