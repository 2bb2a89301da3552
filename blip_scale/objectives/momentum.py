"""Update of the momentum encoders: an exponential moving average of any slices of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def momentum_update_(
    averages: Sequence[Tensor], weights: Sequence[Tensor], momentum: float
) -> None:
    """Set average to momentum * average + (1 - momentum) * weight, in place.

    Call it once per optimizer step. As published, the update precedes the momentum forward of a
    step and reads the weights after the last optimizer step.

    Args:
        averages: fp32, any shapes: this rank's slices, or whole parameters.
        weights: fp32, the same shapes: the optimizer's master weights, not their bf16 copies.
        momentum: 0.995 as published.

    Raises:
        ValueError: an average or a weight is not fp32. At 0.995 a bf16 average never changes,
            because rounding loses the increment.
    """
    for index, tensor in enumerate((*averages, *weights)):
        if tensor.dtype != torch.float32:
            kind = "average" if index < len(averages) else "weight"
            raise ValueError(
                f"momentum update: {kind} {index % len(averages)} is {tensor.dtype}, not fp32"
            )
    if averages:  # a rank may hold no element of any pair
        torch._foreach_lerp_(list(averages), list(weights), 1.0 - momentum)
