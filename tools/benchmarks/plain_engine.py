"""Plain PyTorch in place of the DeepSpeed engine, for `tools/benchmark.py step --against plain`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip_scale.config.recipe import OptimizerRecipe


class PlainEngine:
    """Plain PyTorch in place of `ZeroEngine`, to measure the cost of the engine.

    In bf16 it keeps fp32 masters, like the engine.
    """

    def __init__(self, network: nn.Module, settings: OptimizerRecipe) -> None:
        self.module = self.forward = network
        first = next(network.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.norm_names = ("all",)
        self._trainable = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._masters: dict[str, nn.Parameter] = {}
        for name, parameter in self._trainable.items():
            is_fp32 = parameter.dtype == torch.float32
            master = parameter if is_fp32 else nn.Parameter(parameter.detach().float())
            self._masters[name] = master
        self._optimizer = torch.optim.AdamW(
            self._masters.values(), betas=settings.betas, weight_decay=settings.weight_decay,
            eps=settings.eps, fused=True,
        )  # fmt: skip
        self.slices = [_PlainSlice(name, master) for name, master in self._masters.items()]

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Compute the gradients of one micro-batch."""
        loss.backward()

    def squared_norms(self) -> Tensor:
        """Sum of squares of all gradients, fp64 [1]."""
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients).double().square()[None]

    def step(self, learning_rate: float, apply: bool, norm: Tensor) -> None:
        """Update the masters with AdamW, and copy them to the compute weights."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self._trainable.items():
            master = self._masters[name]
            if master is not parameter:
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        if apply:
            self._optimizer.step()
        self._optimizer.zero_grad()
        self.refresh()

    def refresh(self, names: list[str] | None = None) -> None:
        """Copy the masters to the compute weights."""
        for name in names or self._trainable:
            if self._masters[name] is not self._trainable[name]:
                self._trainable[name].data.copy_(self._masters[name].data)


class _PlainSlice:
    def __init__(self, name: str, master: nn.Parameter) -> None:
        self.name, self.weight = name, master.data


class PlainMomentum:
    """fp32 momentum averages, and the momentum weights that are copied from them."""

    def __init__(self, engine: PlainEngine, pairs: dict[str, str]) -> None:
        parameters = dict(engine.module.named_parameters(remove_duplicate=False))
        masters = {piece.name: piece.weight for piece in engine.slices}
        for copy, online in pairs.items():
            parameters[copy].data.copy_(parameters[online].data)
        moving = {copy: online for copy, online in pairs.items() if online in masters}
        self._copies = [parameters[name].data for name in moving]
        self.weight_runs = [masters[name] for name in moving.values()]
        fp32 = engine.dtype == torch.float32
        self.average_runs = self._copies if fp32 else [w.clone() for w in self.weight_runs]

    def refresh(self) -> None:
        """Copy the averages to the momentum weights. In fp32 both are the same tensors."""
        if self.average_runs is not self._copies:
            torch._foreach_copy_(self._copies, self.average_runs)
