"""Image-text matching (ITM): hard negatives drawn from the contrastive similarities, labels, loss.

Legend: B batch of this rank, P pool from which negatives are drawn. The pool is the rank's batch
(P = B, as published) or the batches of all ranks in rank order (P = B x ranks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_FLOOR = 1e-4
"""Constant added to every softmax weight, so that a peaked row still has possible negatives."""

CONSTANT_PREDICTION_LOSS = math.log(3) - 2 / 3 * math.log(2)
"""Loss (0.6365) of a head that learned only that one pair in three matches."""


@dataclass(frozen=True)
class HardNegatives:
    """Indices of the negatives in the pool, int64 [B] each."""

    image: Tensor
    """Image of the mismatched pair of each text."""
    text: Tensor
    """Text of the mismatched pair of each image."""


def check_pool(pool_size: int) -> None:
    """Refuse a pool without negatives.

    Raises:
        ValueError: the pool is a single pair.
    """
    if pool_size < 2:
        raise ValueError(
            "hard negatives: a pool of one pair holds no negative; give each rank a micro-batch of "
            "2 or more, or set objective.itm to global on several ranks"
        )


@torch.no_grad()
def negative_weights(
    similarities_BP: Tensor, first_positive: int = 0, same_image_BP: Tensor | None = None
) -> Tensor:
    """Compute the sampling weights of the negatives, fp32 [B, P].

    In pretraining, the weights are the softmax over the pool plus `WEIGHT_FLOOR`, and 0 for the
    positive. With `same_image_BP`, as in retrieval fine-tuning, they are the softmax over the pairs
    of other images, and 0 for all pairs of the same image. Up to a factor per row, this equals the
    published softmax over all pairs, but no row becomes all zeros.

    Args:
        similarities_BP: similarities of the batch to the pool, already divided by the temperature.
        first_positive: column of the positive of query 0. Those of the other queries follow.
        same_image_BP: [B, P] bool, pairs of the same image.
    """
    if same_image_BP is not None:
        never = torch.finfo(torch.float32).min  # not -inf: a row may have no other image
        return similarities_BP.float().masked_fill(same_image_BP, never).softmax(dim=1)
    weights_BP = similarities_BP.float().softmax(dim=1).add_(WEIGHT_FLOOR)
    batch = len(weights_BP)
    weights_BP[:, first_positive : first_positive + batch].fill_diagonal_(0.0)
    return weights_BP


def draw_negatives(
    text_to_image_BP: Tensor,
    image_to_text_BP: Tensor,
    generator: torch.Generator,
    first_positive: int = 0,
    same_image_BP: Tensor | None = None,
) -> HardNegatives:
    """Draw one negative image for each text and one negative text for each image.

    More similar negatives are more likely. Negative images are drawn first, as published.

    Args:
        text_to_image_BP: similarities of the batch's texts to the pool's images. For the local pool
            they are the first B columns of `Similarities.text_to_image`.
        image_to_text_BP: similarities of the batch's images to the pool's texts.
        generator: generator on the device of the similarities.
        first_positive: 0 for the local pool, rank * B for the global one.
        same_image_BP: see `negative_weights`. If a row has no other image, a pair of the same image
            is drawn, which `pair_labels` labels as a match.

    Raises:
        ValueError: the pool is a single pair.
    """
    check_pool(text_to_image_BP.shape[1])
    image_B, text_B = (
        _draw(negative_weights(similarities_BP, first_positive, same_image_BP), generator)
        for similarities_BP in (text_to_image_BP, image_to_text_BP)
    )
    return HardNegatives(image=image_B, text=text_B)


def _draw(weights_BP: Tensor, generator: torch.Generator) -> Tensor:
    # This exponential race gives the same draws as torch.multinomial with one draw per row.
    # torch.multinomial also checks the weights. This makes the host wait for the device, and raises
    # on non-finite similarities, although the training loop would only skip the step.
    race_BP = torch.empty_like(weights_BP).exponential_(generator=generator)
    return (weights_BP / race_BP).argmax(dim=1)


def match_labels(batch: int, device: torch.device | str) -> Tensor:
    """Return the labels [3B] int64: B matches (1), then B wrong images and B wrong texts (0)."""
    labels = torch.zeros(3 * batch, dtype=torch.int64, device=device)
    labels[:batch] = 1
    return labels


def pair_labels(negatives: HardNegatives, same_image_BP: Tensor) -> Tensor:
    """Return `match_labels`, but with label 1 for drawn pairs of the same image."""
    labels = match_labels(len(same_image_BP), same_image_BP.device)
    drawn_B2 = torch.stack([negatives.image, negatives.text], dim=1)
    labels[len(same_image_BP) :] = same_image_BP.gather(1, drawn_B2).T.flatten()
    return labels


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross entropy of logits [3B, 2]; class 1 is a match; fp32 scalar."""
    return F.cross_entropy(logits.float(), labels)


@torch.no_grad()
def match_accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the accuracy of the matching head on matches and on mismatches.

    Args:
        logits: [3B, 2].
        labels: [3B], from `match_labels`.

    Returns:
        Two fp32 scalars on the device. (1, 0) and (0, 1) mean that the head predicts one class.
    """
    right = (logits.argmax(dim=1) == labels).float()
    matched = labels.float()
    on_match = (right * matched).sum() / matched.sum()
    on_mismatch = (right * (1 - matched)).sum() / (1 - matched).sum().clamp(min=1)
    return on_match, on_mismatch


def predicts_one_class(loss: float, accuracy_match: float, accuracy_mismatch: float) -> bool:
    """Whether the head predicts the same class for every pair.

    This is the case if the loss is within 0.02 of `CONSTANT_PREDICTION_LOSS`, or if one class is
    nearly always right (above 0.99) and the other nearly always wrong (below 0.01).
    """
    one_sided = max(accuracy_match, accuracy_mismatch) > 0.99
    one_sided = one_sided and min(accuracy_match, accuracy_mismatch) < 0.01
    return one_sided or abs(loss - CONSTANT_PREDICTION_LOSS) < 0.02
