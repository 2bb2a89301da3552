"""Dropout with a fast random generator on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability p and divide the others by 1 - p, as in training.

    On a GPU this is torch's dropout. On a CPU, torch draws a floating-point number for each
    element, which takes 3 to 4 times as long as this function. Here, four elements share the 64
    bits of one draw, so p is rounded to a multiple of 2^-16. Compiled code uses torch's dropout,
    which can be fused but draws other numbers.

    Args:
        x: any shape and floating type.
        p: 0 <= p < 1; 0 returns x itself.
    """
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    if x.device.type != "cpu" or not dropped or torch.compiler.is_compiling():
        return F.dropout(x, p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    scales = (bits >= dropped - _LEVELS // 2).to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
    return x * scales


class Dropout(nn.Dropout):
    """Module that applies `dropout` in training mode only."""

    def forward(self, input: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        return dropout(input, self.p) if self.training else input
