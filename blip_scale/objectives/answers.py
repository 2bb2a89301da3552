"""Loss of the answers to questions (VQA).

Legend: A answers, P predicted tokens of all answers, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sequence_losses(
    logits_PV: Tensor, targets_P: Tensor, sequences_P: Tensor, count: int, label_smoothing: float
) -> Tensor:
    """Sum the label-smoothed cross entropy over the tokens of each sequence, [A] fp32.

    Args:
        logits_PV: any floating type.
        targets_P: int64.
        sequences_P: int64, index of each token's sequence.
        count: number of sequences A.
        label_smoothing: share of the target that is spread over the vocabulary.
    """
    losses_P = F.cross_entropy(
        logits_PV.float(), targets_P, label_smoothing=label_smoothing, reduction="none"
    )
    return losses_P.new_zeros(count).index_add_(0, sequences_P, losses_P)


def answer_loss(losses_A: Tensor, weights_A: Tensor, questions: int) -> Tensor:
    """Sum the weighted losses of the answers and divide by the number of questions; fp32 scalar.

    The weight of a unique answer is the share of people who gave it. As published, the sum is not
    divided by the number of answers or by their weights.
    """
    return (losses_A * weights_A).sum() / questions
