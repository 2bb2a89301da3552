"""The update of momentum copies, element by element on whatever shards it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def momentum_update_(
    averages: Sequence[Tensor], weights: Sequence[Tensor], momentum: float
) -> None:
    """average <- momentum * average + (1 - momentum) * weight, in place, once an optimizer step.

    Published order: before the momentum forward of a step, with the weights as the last optimizer
    step left them.

    Args:
        averages: fp32, any shapes; this rank's shards, or whole parameters.
        weights: fp32, the same shapes; the optimizer's masters, not their bf16 copies.
        momentum: 0.995 as published.

    Raises:
        ValueError: an average or a weight is not fp32. At 0.995 a bf16 average never moves: the
            increment is lost to rounding.
    """
    for index, tensor in enumerate((*averages, *weights)):
        if tensor.dtype != torch.float32:
            kind = "average" if index < len(averages) else "weight"
            raise ValueError(
                f"momentum update: {kind} {index % len(averages)} is {tensor.dtype}, not fp32"
            )
    if averages:  # a rank may own no element of any pair
        torch._foreach_lerp_(list(averages), list(weights), 1.0 - momentum)
