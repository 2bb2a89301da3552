"""Image-text matching (ITM): hard negatives drawn from the contrastive similarities, labels, loss.

Legend: B batch of this rank, P pool that negatives are drawn from: the rank's own batch (P = B, as
published) or the batches of all ranks in rank order (P = B x ranks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_FLOOR = 1e-4
"""Added to every softmax weight: a peaked row can be drawn from even without its positive."""

CONSTANT_PREDICTION_LOSS = math.log(3) - 2 / 3 * math.log(2)
"""0.6365: the loss of a head that learned only that one pair in three matches."""


@dataclass(frozen=True)
class HardNegatives:
    """Rows of the pool, int64 [B] each."""

    image: Tensor
    """For each text of the batch the image that it is wrongly paired with."""
    text: Tensor
    """For each image of the batch the text that it is wrongly paired with."""


def check_pool(pool_size: int) -> None:
    """Refuse a pool that holds no negative.

    Raises:
        ValueError: the pool is a single pair.
    """
    if pool_size < 2:
        raise ValueError(
            "hard negatives: a pool of one pair holds no negative; give each rank a micro-batch of "
            "2 or more, or set objective.negatives to global on several ranks"
        )


@torch.no_grad()
def negative_weights(
    similarities_BP: Tensor, first_positive: int = 0, same_image_BP: Tensor | None = None
) -> Tensor:
    """Weights to draw by [B, P], fp32: softmax over the pool plus 1e-4, 0 for the positive.

    With `same_image_BP`, as in retrieval fine-tuning: softmax over the others, 0 for all pairs of
    the same image (the published softmax over all with these set to 0, but for a factor a row, and
    without its rows of zeros).

    Args:
        similarities_BP: similarities of the batch to the pool, already divided by the temperature.
        first_positive: row of the pool that is the positive of query 0; the next follow it.
        same_image_BP: [B, P] bool.
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
    """One negative image a text and one negative text an image, likelier the more similar they are.

    Text-to-image draws come first, as published.

    Args:
        text_to_image_BP: similarities of the batch's texts to the pool's images: for the local pool
            the first B columns of `Similarities.text_to_image`.
        image_to_text_BP: the same of the batch's images to the pool's texts.
        generator: on the device of the similarities.
        first_positive: 0 for the local pool, rank * B for the global one.
        same_image_BP: see `negative_weights`; where a row has no other image, one of the same is
            drawn (so `pair_labels`).

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
    # The exponential race, which torch.multinomial runs as well for one draw a row: same draws from
    # the same generator, but without its check of the weights, which makes the host wait for the
    # device and turns a step of non-finite similarities, which the loop skips, into an exception.
    race_BP = torch.empty_like(weights_BP).exponential_(generator=generator)
    return (weights_BP / race_BP).argmax(dim=1)


def match_labels(batch: int, device: torch.device | str) -> Tensor:
    """Labels [3B] int64: B matched pairs (1), then B wrong images and B wrong texts (0)."""
    labels = torch.zeros(3 * batch, dtype=torch.int64, device=device)
    labels[:batch] = 1
    return labels


def pair_labels(negatives: HardNegatives, same_image_BP: Tensor) -> Tensor:
    """`match_labels` where a pool may hold an image again: a drawn pair of the same image is a
    match."""
    labels = match_labels(len(same_image_BP), same_image_BP.device)
    drawn_B2 = torch.stack([negatives.image, negatives.text], dim=1)
    labels[len(same_image_BP) :] = same_image_BP.gather(1, drawn_B2).T.flatten()
    return labels


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of match logits [3B, 2], class 1 is a match; fp32 scalar."""
    return F.cross_entropy(logits.float(), labels)


@torch.no_grad()
def match_accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the matches that were called one, and of the mismatches that were not.

    Args:
        logits: [3B, 2].
        labels: [3B], from `match_labels`.

    Returns:
        two fp32 scalars on the device: (1, 0) or (0, 1) is a head that knows one answer only.
    """
    right = (logits.argmax(dim=1) == labels).float()
    matched = labels.float()
    on_match = (right * matched).sum() / matched.sum()
    on_mismatch = (right * (1 - matched)).sum() / (1 - matched).sum().clamp(min=1)
    return on_match, on_mismatch


def predicts_one_class(loss: float, accuracy_match: float, accuracy_mismatch: float) -> bool:
    """Whether these figures are those of a head that gives every pair the same answer.

    Either the loss lies within 0.02 of the constant prediction's 0.6365, or one class is (nearly)
    always right and the other (nearly) always wrong.
    """
    one_sided = max(accuracy_match, accuracy_mismatch) > 0.99
    one_sided = one_sided and min(accuracy_match, accuracy_mismatch) < 0.01
    return one_sided or abs(loss - CONSTANT_PREDICTION_LOSS) < 0.02
