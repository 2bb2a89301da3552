"""fp32 linear layers on a CPU that Intel did not make, through oneDNN.

torch takes MKL's products in fp32, and oneDNN's in bf16. On AMD's processors MKL is the slower one:
a forward product of a ViT-B layer takes a fifth less time in oneDNN.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_product = torch.ops.mkldnn._linear_pointwise


class _Linear(torch.autograd.Function):
    """As torch's linear layer; the gradient of the weight stays MKL's, which is as fast there.

    The weight is saved as the parameter itself, so ZeRO-3 may let it go and gather it in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            of_x = _product(gradient, weight.t(), None, "none", [], "")
        if ctx.needs_input_grad[1]:
            of_weight = rows.t() @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


class OneDNNLinear(nn.Linear):
    """nn.Linear with oneDNN's products."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], fp32 on the CPU."""
        y: Tensor = _Linear.apply(x, self.weight, self.bias)
        return y


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def take_where_faster(network: nn.Module) -> None:
    """Let the linear layers of a network, fp32 on the CPU, be oneDNN's where it is the faster."""
    cpus = Path("/proc/cpuinfo")
    is_amd = cpus.is_file() and "AuthenticAMD" in cpus.read_text()
    if is_amd and torch.backends.mkldnn.is_available():
        take_onednn(network)


def take_onednn(network: nn.Module) -> None:
    """Let the linear layers of a network be oneDNN's."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
