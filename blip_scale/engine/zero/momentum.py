"""Momentum copies under ZeRO: fp32 averages of this rank's slices, and their compute weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blip_scale.engine import collectives
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.parameter_slices import ParameterSlice, SliceValues
from blip_scale.engine.zero.whole_weights import FlatWeights


class ShardedMomentum:
    """fp32 averages of the parameter slices that have a momentum copy.

    Updating the averages from the optimizer's fp32 masters needs no communication: a copy has the
    shape of its parameter, so a rank owns the same elements of both. bf16 averages would never
    change, because with momentum 0.995 an increment is below half a unit in the last place. Only
    the compute weights of the momentum forward are therefore bf16. `refresh` rewrites them from the
    averages. In fp32 under ZeRO-3, averages and compute weights share memory.

    A frozen parameter and its copy are the same `Parameter`, so no average is kept.
    """

    def __init__(self, engine: ZeroEngine, pairs: dict[str, str]) -> None:
        """Initialize the averages with the parameters.

        Args:
            engine: the wrapped network, which holds both parameters of each pair.
            pairs: momentum parameter name -> name of the parameter that it follows.
        """
        named = engine.module.named_parameters(remove_duplicate=False)
        parameters: dict[str, nn.Parameter] = dict(named)
        self._engine = engine
        self._copies: dict[str, nn.Parameter] = {}
        for momentum, online in pairs.items():
            if parameters[momentum] is not parameters[online]:
                self._copies[online] = parameters[momentum]
        self.slices: list[ParameterSlice] = [
            piece for piece in engine.slices if piece.name in self._copies
        ]
        self._flat: FlatWeights | None = None
        """Compute weights of the momentum copies, if weights stay whole."""
        self._flat_averages: Tensor | None = None
        self.averages: list[Tensor] = self._begun()
        """Flat fp32 averages, one for each slice."""
        masters = [piece.weight for piece in self.slices]
        self.average_runs, self.weight_runs = _joined(self.averages, masters)
        """Averages and fp32 masters in fewer and larger tensors: slices that lie end to end in both
        are joined."""
        self.refresh()

    def _begun(self) -> list[Tensor]:
        """Create the averages, equal to the masters."""
        engine, masters = self._engine, [piece.weight for piece in self.slices]
        if engine.weights_stay_whole:
            names = [name for name in engine.trainable if name in self._copies]
            averages = self._lay_flat(names)
        elif engine.stage == 3:
            copies = [self._copies[piece.name].ds_tensor.data for piece in self.slices]
            kinds = {(t.dtype, t.device) for t in (*copies, *masters)}
            cut = [c[: piece.numel] for c, piece in zip(copies, self.slices, strict=True)]
            averages = cut if len(kinds) == 1 else _end_to_end(masters)
        else:
            averages = _end_to_end(masters)
        for average, master in zip(averages, masters, strict=True):
            average.copy_(master)
        return averages

    def _lay_flat(self, names: list[str]) -> list[Tensor]:
        """Keep the momentum weights of parameters whole. Return averages in the same layout."""
        if not names:
            return []
        flat = self._engine.keep_whole([self._copies[name] for name in names])
        averages = flat.parts
        if averages.dtype != torch.float32:
            averages = torch.zeros_like(averages, dtype=torch.float32)
            self._flat_averages = averages
        self._flat = flat
        places = dict(zip(names, averages.split(flat.sizes), strict=True))
        return [places[piece.name][: piece.numel] for piece in self.slices]

    @property
    def weights(self) -> list[Tensor]:
        """fp32 master weights that the averages follow, in the order of `averages`."""
        return [piece.weight for piece in self.slices]

    def refresh(self) -> None:
        """Rewrite the compute weights of the momentum copies from the averages."""
        if self._flat is None:
            names = list(self._copies)
            positions = {name: index for index, name in enumerate(names)}
            parts = [
                SliceValues(positions[piece.name], piece.start, average)
                for piece, average in zip(self.slices, self.averages, strict=True)
            ]
            self._engine.assign([self._copies[name] for name in names], parts)
            return
        if self._flat_averages is not None:
            self._flat.parts.copy_(self._flat_averages)
        self._flat.is_stale = True

    def gap(self) -> float:
        """Return |average - weight| / |weight| over all ranks. It is 0 right after a copy."""
        squares = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        for average, weight in zip(self.average_runs, self.weight_runs, strict=True):
            squares[0] += torch.linalg.vector_norm(average - weight).double() ** 2
            squares[1] += torch.linalg.vector_norm(weight).double() ** 2
        distance, size = collectives.all_reduce_sum(squares).sqrt().tolist()
        return distance / max(size, 1e-12)


def _end_to_end(tensors: Sequence[Tensor]) -> list[Tensor]:
    """New flat tensors of the given tensors' sizes, end to end in one storage."""
    if not tensors:
        return []
    sizes = [tensor.numel() for tensor in tensors]
    return list(tensors[0].new_empty(sum(sizes)).split(sizes))


def _joined(
    averages: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs of flat tensors, with neighbours joined that lie end to end in both."""
    runs: list[list[Tensor]] = []
    for average, weight in zip(averages, weights, strict=True):
        if runs and _follows(runs[-1][0], average) and _follows(runs[-1][1], weight):
            runs[-1] = [_longer(runs[-1][0], average), _longer(runs[-1][1], weight)]
        else:
            runs.append([average, weight])
    return [average for average, _ in runs], [weight for _, weight in runs]


def _follows(first: Tensor, second: Tensor) -> bool:
    """Whether a flat tensor begins where another one ends."""
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same and int(first.storage_offset()) + first.numel() == int(second.storage_offset())


def _longer(first: Tensor, second: Tensor) -> Tensor:
    numel = first.numel() + second.numel()
    return torch.as_strided(first, (numel,), (1,), first.storage_offset())
