"""Parameter slices: the part of each parameter that this rank owns.

Under ZeRO-3 it is an equal slice of each flattened parameter. Under ZeRO-1/2 it is a stretch of all
parameters laid end to end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from blip_scale.engine import collectives
from blip_scale.engine.zero import deepspeed_patches

_LONGEST = 2**20


@dataclass(frozen=True)
class ParameterSlice:
    """This rank's part of one parameter: elements [start, start + numel) of it, flattened."""

    name: str
    parameter: nn.Parameter
    start: int
    numel: int
    flat: Tensor
    """The optimizer's fp32 master tensor, which holds this slice among others. For a frozen
    parameter, a separate tensor."""
    offset: int
    """Index in `flat` at which the slice begins."""

    @property
    def trains(self) -> bool:
        """Whether the optimizer updates the parameter. It has no state of frozen ones."""
        return self.parameter.requires_grad

    @property
    def weight(self) -> Tensor:
        """fp32 master weights [numel], a view: writing changes the optimizer's copy."""
        return self.flat.detach()[self.offset : self.offset + self.numel]

    def state(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """Optimizer state `key` (exp_avg, exp_avg_sq) [numel], a view."""
        return optimizer.state[self.flat][key][self.offset : self.offset + self.numel]


@dataclass(frozen=True)
class SliceValues:
    """Values [numel] to write to parameter `index` of a list, from element `start` on."""

    index: int
    start: int
    values: Tensor


def trainable_slice(
    engine: Any, stage: int, name: str, parameter: nn.Parameter
) -> list[ParameterSlice]:
    """This rank's slice of a parameter; empty if other ranks own all of it.

    `engine` is DeepSpeed's.
    """
    zero = engine.optimizer
    if stage == 3:
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        begin = size * collectives.rank()
        numel = max(0, min(size, parameter.ds_numel - begin))
        flat = zero.fp32_partitioned_groups_flat[group]
    else:
        # DeepSpeed calls compute weights lp (low precision) and fp32 masters hp (high precision).
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        begin, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return [ParameterSlice(name, parameter, begin, numel, flat, offset)] if numel else []


def frozen_slice(name: str, parameter: nn.Parameter) -> list[ParameterSlice]:
    """This rank's slice of a frozen parameter; empty if other ranks own all of it.

    Its fp32 weights lie in the host's memory. Only the start, a save and a restore read them.
    Without them, checkpoints of a bf16 run would hold rounded weights.
    """
    total = getattr(parameter, "ds_numel", parameter.numel())
    size = -(-total // collectives.world_size())
    begin = size * collectives.rank()
    numel = max(0, min(size, total - begin))
    flat = torch.zeros(numel, dtype=torch.float32)
    return [ParameterSlice(name, parameter, begin, numel, flat, 0)] if numel else []


def gradients_of(pieces: Sequence[ParameterSlice], engine: Any) -> list[Tensor]:
    """Flat averaged gradients of slices, between the last backward and the optimizer step.

    Neighbouring slices are joined to fewer and larger tensors. But no tensor is longer than 2^20
    elements, as torch's norm on a CPU sums up in fp32.

    Args:
        pieces: slices that train.
        engine: DeepSpeed's engine.
    """
    gradients: list[Tensor] = []
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        for piece in pieces:
            index = piece.parameter._index_in_param_group
            fragment = piece.parameter._hp_mapping.get_lp_grad_fragment(index)
            if fragment is not None:
                gradients.append(fragment)
    elif zero.offload_optimizer:
        for piece in pieces:
            if piece.flat.grad is not None:
                gradients.append(piece.flat.grad[piece.offset : piece.offset + piece.numel])
    elif not deepspeed_patches.are_checked():
        for piece in pieces:
            gradient = deepspeed.utils.safe_get_local_grad(piece.parameter)
            gradients.append(gradient[: piece.numel])
    else:
        begins = [0, *itertools.accumulate(zero.fp16_partitioned_groups_flat_numel)]
        flats = [*map(id, zero.fp32_partitioned_groups_flat)]
        groups = dict(zip(flats, begins[:-1], strict=True))
        stretches = [(groups[id(piece.flat)] + piece.offset, piece.numel) for piece in pieces]
        for begin, numel in _runs(stretches):
            gradients.append(zero.grad_partitions_flat_buffer[begin : begin + numel])
    return [part for gradient in gradients for part in gradient.split(_LONGEST) if gradient.numel()]


def _runs(stretches: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(begin, numel) of stretches, with neighbours joined that lie end to end."""
    runs: list[tuple[int, int]] = []
    for begin, numel in stretches:
        if runs and sum(runs[-1]) == begin:
            runs[-1] = (runs[-1][0], runs[-1][1] + numel)
        else:
            runs.append((begin, numel))
    return runs
