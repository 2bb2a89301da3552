"""Image-text contrastive loss (ITC) against momentum keys and queues, with soft targets.

Legend: B batch of this rank, E embed_dim, Q queue, K = B + Q keys (this rank's momentum features of
the step, then the queue). Everything is computed in fp32, because similarities divided by a
temperature of 0.001 reach 1000, where the spacing of bf16 is 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeaturePair:
    """Features of images and of their texts, in the same order."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class Similarities:
    """Scaled similarities in both directions, fp32. The positive of row b is column b."""

    image_to_text: Tensor
    """Image b against all text keys in row b, [B, K]."""
    text_to_image: Tensor
    """Text b against all image keys in row b, [B, K]."""


def similarities(
    queries: FeaturePair, keys: FeaturePair, queue: FeaturePair, temperature: Tensor
) -> Similarities:
    """Compute similarities of queries to momentum keys and queue, divided by the temperature.

    A step calls this twice. With online features as queries, the gradient flows to them and to the
    temperature. With momentum features as queries, under `no_grad`, the softmax of the result gives
    the soft targets.

    Args:
        queries: normalised features [B, E].
        keys: this rank's normalised momentum features [B, E] of the same pairs, without gradient.
        queue: momentum features of earlier steps [E, Q], one per column, without gradient.
        temperature: scalar divisor, positive.
    """
    return Similarities(
        image_to_text=_scaled(queries.image, keys.text, queue.text, temperature),
        text_to_image=_scaled(queries.text, keys.image, queue.image, temperature),
    )


def _scaled(queries_BE: Tensor, keys_BE: Tensor, queue_EQ: Tensor, temperature: Tensor) -> Tensor:
    # Divide the B x E queries, not the B x K products. Compute two products instead of copying keys
    # and queue into one matrix, which would move 59 MB per direction and step at published sizes.
    scaled_BE = queries_BE.float() / temperature.float()
    in_batch_BB = scaled_BE @ keys_BE.detach().float().T
    return torch.cat([in_batch_BB, scaled_BE @ queue_EQ.detach()], dim=1)


@torch.no_grad()
def soft_targets(
    momentum_BK: Tensor, alpha: float | Tensor, positives_BK: Tensor | None = None
) -> Tensor:
    """Compute targets [B, K]: alpha times the momentum softmax, the rest on the positive.

    See ALBEF, section 3.2. If a row of `positives_BK` (bool) has several positives, the rest is
    spread evenly over them. See `itc_loss` for `alpha`.
    """
    soft, hard = alpha if isinstance(alpha, Tensor) else (alpha, 1.0 - alpha)
    targets_BK = momentum_BK.softmax(dim=1).mul_(soft)
    if positives_BK is None:
        targets_BK.diagonal().add_(hard)
    else:
        count_B1 = positives_BK.sum(dim=1, keepdim=True)
        targets_BK.add_(positives_BK / count_B1 * hard)
    return targets_BK


def itc_loss(
    online: Similarities,
    momentum: Similarities,
    alpha: float | Tensor,
    positives_BK: Tensor | None = None,
) -> Tensor:
    """Compute the cross entropy with soft targets, mean over rows and directions; fp32 scalar.

    Args:
        online: similarities of the online features, with gradient.
        momentum: similarities of the momentum features, same shape.
        alpha: weight of the soft targets, from `alpha_at`. Alternatively [2] fp64 on the device,
            alpha and 1 - alpha, so that the host sends no number in the middle of a step.
        positives_BK: [B, K] bool, keys of the same image. None: only the row's own pair.
    """
    image_to_text = F.cross_entropy(
        online.image_to_text, soft_targets(momentum.image_to_text, alpha, positives_BK)
    )
    text_to_image = F.cross_entropy(
        online.text_to_image, soft_targets(momentum.text_to_image, alpha, positives_BK)
    )
    return (image_to_text + text_to_image) / 2


def alpha_at(step: int, steps_per_epoch: int, alpha: float, ramp_epochs: float) -> float:
    """Return the soft targets' weight at step `step` (from 0). It rises linearly over the ramp."""
    ramp_steps = ramp_epochs * steps_per_epoch
    return alpha if step >= ramp_steps else alpha * step / ramp_steps


@torch.no_grad()
def retrieval_accuracy(online: Similarities) -> tuple[Tensor, Tensor]:
    """Compute the top-1 accuracy of retrieval within this rank's batch.

    Returns:
        Image-to-text and text-to-image accuracy, fp32 scalars on the device. Chance is 1 / B.
    """
    batch = len(online.image_to_text)
    positives_B = torch.arange(batch, device=online.image_to_text.device)

    def top1(scores_BK: Tensor) -> Tensor:
        return (scores_BK[:, :batch].argmax(dim=1) == positives_B).float().mean()

    return top1(online.image_to_text), top1(online.text_to_image)
