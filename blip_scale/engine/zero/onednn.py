"""Linear layers on a CPU with oneDNN's linear operation.

In fp32 torch uses MKL. On AMD processors oneDNN is faster: a forward product of a ViT-B layer takes
a fifth less time. In bf16 torch uses oneDNN, but writes the bias first and adds the product to it.
Here oneDNN adds the bias within the product.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # torch 2.14 ignores the strides of a bias here
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _Linear(torch.autograd.Function):
    """torch's linear layer with oneDNN's products, except for the gradient of the weight.

    torch is as fast there. The parameter itself is saved for the backward, so ZeRO-3 can release it
    and gather it again in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            of_x = _product(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            of_weight = rows.t() @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


class OneDNNLinear(nn.Linear):
    """nn.Linear with oneDNN's products."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], fp32 or bf16 on the CPU."""
        y: Tensor = _Linear.apply(x, self.weight, self.bias)
        return y


def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


if torch.backends.mkldnn.is_available():  # otherwise the operation does not exist
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


def take_where_faster(network: nn.Module) -> None:
    """Replace the linear layers of a network by oneDNN's where these are faster.

    They are on a CPU: in fp32 on AMD processors, in bf16 on processors that oneDNN supports.
    """
    first = next(network.parameters())
    if first.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    if first.dtype == torch.float32:
        cpus = Path("/proc/cpuinfo")
        faster = cpus.is_file() and "AuthenticAMD" in cpus.read_text()
    else:
        in_bf16 = first.dtype == torch.bfloat16
        faster = in_bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if faster:
        take_onednn(network)


def take_onednn(network: nn.Module) -> None:
    """Replace the linear layers of a network by oneDNN's."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
