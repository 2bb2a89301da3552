"""Momentum copies on ZeRO: the fp32 average of this rank's own shards, and the weights that compute
with it."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from blip_scale.engine import collectives
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.parameter_slices import Part, Shard


class ShardedMomentum:
    """fp32 averages of the shards that have a momentum copy.

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
        paired = [shard for shard in engine.shards if shard.name in self._copies]
        self.shards: list[Shard] = [shard for shard in paired if shard.trains]
        self._frozen = [shard for shard in paired if not shard.trains]
        self.averages: list[Tensor] = [self._begun(shard) for shard in self.shards]
        self.refresh()
        self.copy_frozen()

    def _begun(self, shard: Shard) -> Tensor:
        """The shard's weights as a tensor of their own, the first average."""
        if self._engine.stage == 3:
            own: Tensor = self._copies[shard.name].ds_tensor.data[: shard.numel]
            if (own.dtype, own.device) == (shard.weight.dtype, shard.weight.device):
                return own.copy_(shard.weight)
        return shard.weight.clone()

    @property
    def weights(self) -> list[Tensor]:
        """fp32 master weights that the averages follow, in the order of `averages`."""
        return [shard.weight for shard in self.shards]

    def refresh(self) -> None:
        """Rewrite the momentum weights that compute from the averages."""
        self._assign(self._engine.trainable, self.shards, self.averages)

    def copy_frozen(self) -> None:
        """Rewrite the momentum weights of frozen parameters, after those have been set."""
        self._assign(self._engine.frozen, self._frozen, [shard.weight for shard in self._frozen])

    def _assign(self, online: Container[str], shards: list[Shard], values: list[Tensor]) -> None:
        """Write the copies of the parameters in `online`; the same ones on every rank."""
        names = [name for name in self._copies if name in online]
        positions = {name: index for index, name in enumerate(names)}
        parts = [
            Part(positions[shard.name], shard.start, value)
            for shard, value in zip(shards, values, strict=True)
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
