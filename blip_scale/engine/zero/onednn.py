"""Linear layers on a CPU through oneDNN's own linear layer.

In fp32 torch takes MKL's products. On AMD's processors MKL is the slower one: a forward product of
a ViT-B layer takes a fifth less time in oneDNN. In bf16 torch takes oneDNN's products, but writes
the bias first and adds the product to it; here it is added on the way.
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
        bias = bias.contiguous()  # torch 2.14 reads one with strides as if it had none
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _Linear(torch.autograd.Function):
    """As torch's linear layer; the gradient of the weight stays torch's, which is as fast there.

    The weight is saved as the parameter itself, so ZeRO-3 may let it go and gather it in between.
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


if torch.backends.mkldnn.is_available():  # else there is no such operation
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


def take_where_faster(network: nn.Module) -> None:
    """Let the linear layers of a network be oneDNN's where these are the faster ones: on a CPU in
    fp32 on AMD's processors, in bf16 on those that have it."""
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
    """Let the linear layers of a network be oneDNN's."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
