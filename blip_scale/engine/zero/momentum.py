"""Momentum copies on ZeRO: the fp32 average of this rank's own slices, and the weights that compute
with it."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from blip_scale.engine import collectives
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.parameter_slices import ParameterSlice, SliceValues


class ShardedMomentum:
    """fp32 averages of the parameter slices that have a momentum copy.

    The averages are updated from the optimizer's fp32 masters with no communication: a copy and its
    parameter have one shape, so one rank owns the same elements of both. In bf16 the averages would
    not move at all (with momentum 0.995 an increment is below half a unit in the last place), so
    only the weights of the momentum forward are bf16, rewritten from the averages by `refresh`. In
    fp32 under ZeRO-3 they are the averages, in one memory.
    The average of a frozen parameter is the parameter itself: nothing is kept or updated of it.
    """

    def __init__(self, engine: ZeroEngine, pairs: dict[str, str]) -> None:
        """Start from the parameters themselves.

        Args:
            engine: the wrapped network; it holds both parameters of each pair.
            pairs: momentum parameter name -> name of the parameter that it follows.
        """
        parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self._engine = engine
        self._copies = {online: parameters[momentum] for momentum, online in pairs.items()}
        paired = [piece for piece in engine.slices if piece.name in self._copies]
        self.slices: list[ParameterSlice] = [piece for piece in paired if piece.trains]
        self._frozen = [piece for piece in paired if not piece.trains]
        self.averages: list[Tensor] = [self._begun(piece) for piece in self.slices]
        self.refresh()
        self.copy_frozen()

    def _begun(self, piece: ParameterSlice) -> Tensor:
        """The slice's weights as a tensor of their own, the first average."""
        if self._engine.stage == 3:
            own: Tensor = self._copies[piece.name].ds_tensor.data[: piece.numel]
            if (own.dtype, own.device) == (piece.weight.dtype, piece.weight.device):
                return own.copy_(piece.weight)
        return piece.weight.clone()

    @property
    def weights(self) -> list[Tensor]:
        """fp32 master weights that the averages follow, in the order of `averages`."""
        return [piece.weight for piece in self.slices]

    def refresh(self) -> None:
        """Rewrite the momentum weights that compute from the averages."""
        self._assign(self._engine.trainable, self.slices, self.averages)

    def copy_frozen(self) -> None:
        """Rewrite the momentum weights of frozen parameters, after those have been set."""
        self._assign(self._engine.frozen, self._frozen, [piece.weight for piece in self._frozen])

    def _assign(
        self, online: Container[str], slices: list[ParameterSlice], values: list[Tensor]
    ) -> None:
        """Write the copies of the parameters in `online`; the same ones on every rank."""
        names = [name for name in self._copies if name in online]
        positions = {name: index for index, name in enumerate(names)}
        parts = [
            SliceValues(positions[piece.name], piece.start, value)
            for piece, value in zip(slices, values, strict=True)
        ]
        self._engine.assign([self._copies[name] for name in names], parts)

    def gap(self) -> float:
        """Relative distance |average - weight| / |weight| over all ranks: 0 right after a copy."""
        squares = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        for average, weight in zip(self.averages, self.weights, strict=True):
            squares[0] += torch.linalg.vector_norm(average - weight).double() ** 2
            squares[1] += torch.linalg.vector_norm(weight).double() ** 2
        distance, size = collectives.all_reduce_sum(squares).sqrt().tolist()
        return distance / max(size, 1e-12)
