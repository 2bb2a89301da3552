"""Fake ranks for checkpoint tests: a few sliced parameters that are saved and loaded, without
training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from blip_scale.config.recipe import CheckpointRecipe
from blip_scale.engine import collectives
from blip_scale.engine.checkpoints import restore
from blip_scale.engine.checkpoints.location import Place
from blip_scale.engine.checkpoints.save import RunState, Saver
from blip_scale.engine.zero.engine import AdamW
from blip_scale.engine.zero.parameter_slices import ParameterSlice
from blip_scale.storage.objects import ObjectFolder

SIZES = {"first": 7, "second": 20, "last": 1}
FOLLOWED = ("first", "last")
"""Parameters that have a momentum average."""
KINDS = ("weight", "exp_avg", "exp_avg_sq", "momentum")


def values(kind: str, name: str) -> Tensor:
    """Return the values of a tensor. No two tensors share a value."""
    start = 1000 * KINDS.index(kind) + 100 * list(SIZES).index(name)
    return torch.arange(start, start + SIZES[name], dtype=torch.float32)


def even_slices(rank: int, ranks: int) -> dict[str, range]:
    """Return the slices of a rank under ZeRO-3: an equal part of every parameter."""
    cut = {}
    for name, size in SIZES.items():
        each = -(-size // ranks)
        cut[name] = range(min(size, rank * each), min(size, (rank + 1) * each))
    return cut


def one_stretch(rank: int, ranks: int) -> dict[str, range]:
    """Return the slices of a rank under ZeRO-2: a range of the concatenated parameters."""
    each = -(-sum(SIZES.values()) // ranks)
    cut, begin = {}, 0
    for name, size in SIZES.items():
        low, high = (min(size, max(0, edge * each - begin)) for edge in (rank, rank + 1))
        cut[name], begin = range(low, high), begin + size
    return cut


class Pieces:
    """Stand-in for a rank's ZeroEngine and its ShardedMomentum."""

    def __init__(self, cut: dict[str, range], filled: bool = True) -> None:
        owned = {name: part for name, part in cut.items() if len(part)}
        flat = torch.zeros(sum(map(len, owned.values())))
        self.optimizer: torch.optim.Optimizer = AdamW([nn.Parameter(flat)], fused=True)
        self.all_slices: list[ParameterSlice] = []
        for name, part in owned.items():
            offset = sum(piece.numel for piece in self.all_slices)
            piece = ParameterSlice(name, nn.Parameter(flat), part.start, len(part), flat, offset)
            self.all_slices.append(piece)
        followed = [piece for piece in self.all_slices if piece.name in FOLLOWED]
        self.refreshed: list[str] = []
        self.engine: Any = SimpleNamespace(
            slices=self.all_slices,
            trainable={name: torch.empty(size) for name, size in SIZES.items()},
            frozen={},
            optimizer=self.optimizer,
            stage=3,
            device=torch.device("cpu"),
            refresh=lambda: self.refreshed.append("engine"),
        )
        self.momentum: Any = SimpleNamespace(
            slices=followed,
            averages=[torch.zeros(piece.numel) for piece in followed],
            refresh=lambda: self.refreshed.append("momentum"),
        )
        if filled:
            moments = {key: torch.zeros_like(flat) for key in KINDS[1:3]}
            self.optimizer.state[flat] = {"step": torch.tensor(17.0), **moments}
            for kind, piece, tensor in self.tensors():
                tensor += values(kind, piece.name)[piece.start : piece.start + piece.numel]

    def tensors(self) -> list[tuple[str, ParameterSlice, Tensor]]:
        """Return views of all tensors that a checkpoint must contain."""
        views = [("weight", piece, piece.weight) for piece in self.all_slices]
        for key in KINDS[1:3]:
            views += [(key, piece, piece.state(self.optimizer, key)) for piece in self.all_slices]
        pairs = zip(self.momentum.slices, self.momentum.averages, strict=True)
        return views + [("momentum", piece, average) for piece, average in pairs]

    def saver(self, place: Place, start_step: int = 0, **settings: Any) -> Saver:
        """Create a saver that reports to `self.curves`."""
        self.curves: dict[int, dict[str, float]] = {}
        recipe = CheckpointRecipe(**settings)
        report = self.curves.__setitem__
        return Saver(place, recipe, self.engine, self.momentum, report, lambda *_: None, start_step)

    def save(self, folder: Path, step: int = 5, **settings: Any) -> Path | None:
        """Write one checkpoint synchronously, as a run that resumed from an earlier step."""
        settings = {"background": False, "keep_last": 100} | settings
        saver = self.saver(place_of(folder), step - 1, **settings)
        saver.begin(state_of(step))
        return folder / f"step_{step:08d}" if saver.finish() else None


def state_of(step: int) -> RunState:
    position, task = {"seconds": 1.5}, {"queue": {"pointer": 3}}
    return RunState(step, position, task, {"queue/image": torch.eye(3)})


def place_of(folder: Path, remote: ObjectFolder | None = None, is_shared: bool = True) -> Place:
    """Return a location in a folder that is visible to all ranks, or only to this rank."""
    rank, world_size = collectives.rank(), collectives.world_size()
    sharers = tuple(range(world_size)) if is_shared else (rank,)
    return Place(folder, remote, rank, sharers, world_size)


def newest_whole(folder: Path, stage: int = 3) -> Path | None:
    return restore.newest_whole(place_of(folder), stage)


def alone(filled: bool = True) -> Pieces:
    return Pieces(even_slices(0, 1), filled)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
