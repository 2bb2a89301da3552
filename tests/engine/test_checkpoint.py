"""Checkpoints without any training: several ranks as threads, a few parameters cut in pieces."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_ranks import FakeRanks
from torch import Tensor, nn

from blip_scale.engine import checkpoint_files, collectives, restore
from blip_scale.engine.checkpoint import RunState, Saver
from blip_scale.engine.deepspeed import AdamW, Shard
from blip_scale.engine.places import Place
from blip_scale.recipe import CheckpointRecipe

SIZES = {"first": 7, "second": 20, "last": 1}
FOLLOWED = ("first", "last")
"""Parameters with a momentum average."""
KINDS = ("weight", "exp_avg", "exp_avg_sq", "momentum")


def values(kind: str, name: str) -> Tensor:
    """Numbers that occur nowhere else."""
    start = 1000 * KINDS.index(kind) + 100 * list(SIZES).index(name)
    return torch.arange(start, start + SIZES[name], dtype=torch.float32)


def even_slices(rank: int, ranks: int) -> dict[str, range]:
    """As ZeRO-3 cuts: an equal slice of every parameter."""
    cut = {}
    for name, size in SIZES.items():
        each = -(-size // ranks)
        cut[name] = range(min(size, rank * each), min(size, (rank + 1) * each))
    return cut


def one_stretch(rank: int, ranks: int) -> dict[str, range]:
    """As ZeRO-2 cuts: a stretch of all parameters laid end to end."""
    each = -(-sum(SIZES.values()) // ranks)
    cut, begin = {}, 0
    for name, size in SIZES.items():
        low, high = (min(size, max(0, edge * each - begin)) for edge in (rank, rank + 1))
        cut[name], begin = range(low, high), begin + size
    return cut


class Pieces:
    """Stands for a rank's ZeroEngine and its ShardedMomentum."""

    def __init__(self, cut: dict[str, range], filled: bool = True) -> None:
        owned = {name: part for name, part in cut.items() if len(part)}
        flat = torch.zeros(sum(map(len, owned.values())))
        self.optimizer: torch.optim.Optimizer = AdamW([nn.Parameter(flat)], fused=True)
        self.all_shards: list[Shard] = []
        for name, part in owned.items():
            offset = sum(shard.numel for shard in self.all_shards)
            shard = Shard(name, nn.Parameter(flat), part.start, len(part), flat, offset)
            self.all_shards.append(shard)
        followed = [shard for shard in self.all_shards if shard.name in FOLLOWED]
        self.refreshed: list[str] = []
        self.engine: Any = SimpleNamespace(
            shards=self.all_shards,
            trainable={name: torch.empty(size) for name, size in SIZES.items()},
            optimizer=self.optimizer,
            stage=3,
            device=torch.device("cpu"),
            refresh=lambda: self.refreshed.append("engine"),
        )
        self.momentum: Any = SimpleNamespace(
            shards=followed,
            averages=[torch.zeros(shard.numel) for shard in followed],
            refresh=lambda: self.refreshed.append("momentum"),
        )
        if filled:
            moments = {key: torch.zeros_like(flat) for key in KINDS[1:3]}
            self.optimizer.state[flat] = {"step": torch.tensor(17.0), **moments}
            for kind, shard, tensor in self.tensors():
                tensor += values(kind, shard.name)[shard.start : shard.start + shard.numel]

    def tensors(self) -> list[tuple[str, Shard, Tensor]]:
        """Everything that a checkpoint must keep, as live views."""
        found = [("weight", shard, shard.weight) for shard in self.all_shards]
        for key in KINDS[1:3]:
            found += [(key, one, one.state(self.optimizer, key)) for one in self.all_shards]
        pairs = zip(self.momentum.shards, self.momentum.averages, strict=True)
        return found + [("momentum", shard, average) for shard, average in pairs]

    def saver(self, place: Place, start_step: int = 0, **settings: Any) -> Saver:
        """One that keeps what it reports in `self.curves`."""
        self.curves: dict[int, dict[str, float]] = {}
        recipe = CheckpointRecipe(**settings)
        report = self.curves.__setitem__
        return Saver(place, recipe, self.engine, self.momentum, report, start_step)

    def save(self, folder: Path, step: int = 5, **settings: Any) -> Path | None:
        """One checkpoint, written at once, of a run that goes on from those of earlier steps."""
        settings = {"background": False, "keep_last": 100} | settings
        saver = self.saver(place_of(folder), step - 1, **settings)
        saver.begin(state_of(step))
        return folder / f"step_{step:08d}" if saver.finish() else None


def state_of(step: int) -> RunState:
    position, task = {"seconds": 1.5}, {"queue": {"pointer": 3}}
    return RunState(step, position, task, {"queue/image": torch.eye(3)})


def place_of(folder: Path, sharers: tuple[int, ...] | None = None) -> Place:
    """A folder that all ranks see, or some."""
    rank, world_size = collectives.rank(), collectives.world_size()
    return Place(folder, None, rank, sharers or tuple(range(world_size)), world_size)


def newest_whole(folder: Path, stage: int = 3) -> Path | None:
    return restore.newest_whole(place_of(folder), stage)


def alone(filled: bool = True) -> Pieces:
    return Pieces(even_slices(0, 1), filled)


@pytest.mark.parametrize("saved_as", [even_slices, one_stretch])
@pytest.mark.parametrize("loaded_as", [even_slices, one_stretch])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (1, 4), (4, 1)])
def test_ranks_and_stage_may_change(
    tmp_path: Path,
    saved_as: Any,
    loaded_as: Any,
    before: int,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every element finds its owner, whoever wrote it."""
    paths = FakeRanks(before, monkeypatch).run(
        lambda rank: Pieces(saved_as(rank, before)).save(tmp_path)
    )
    assert paths == [tmp_path / "step_00000005"] * before
    manifest = json.loads((tmp_path / "step_00000005" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (5, before)
    assert manifest["optimizer_steps"] == 17
    assert len(manifest["files"]) == before + 1

    def load(rank: int) -> tuple[Pieces, RunState]:
        found = newest_whole(tmp_path)
        assert found is not None
        pieces = Pieces(loaded_as(rank, after), filled=False)
        return pieces, restore.load(found, pieces.engine, pieces.momentum)

    covered = {kind: dict.fromkeys(SIZES, 0) for kind in KINDS}
    for pieces, state in FakeRanks(after, monkeypatch).run(load):
        assert (state.step, state.position) == (5, {"seconds": 1.5})
        assert state.task == {"queue": {"pointer": 3}}
        assert torch.equal(state.shared["queue/image"], torch.eye(3))
        assert pieces.refreshed == ["engine", "momentum"]
        for kind, shard, tensor in pieces.tensors():
            expected = values(kind, shard.name)[shard.start : shard.start + shard.numel]
            assert torch.equal(tensor, expected)
            covered[kind][shard.name] += shard.numel
        if pieces.all_shards:
            assert pieces.optimizer.state[pieces.all_shards[0].flat]["step"] == 17
    for kind in KINDS[:3]:
        assert covered[kind] == SIZES
    assert covered["momentum"] == {name: SIZES[name] * (name in FOLLOWED) for name in SIZES}


def test_a_run_without_an_update_has_no_moments(tmp_path: Path) -> None:
    """All steps so far were skipped: AdamW has no state, before the save and after the load."""
    pieces = alone()
    pieces.optimizer.state.clear()
    pieces.save(tmp_path)
    fresh = alone(filled=False)
    restore.load(tmp_path / "step_00000005", fresh.engine, fresh.momentum)
    assert not fresh.optimizer.state
    assert torch.equal(fresh.all_shards[1].weight, values("weight", "second"))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """And, for ever, those of the steps asked for; what is no checkpoint is left alone."""
    for step in (1, 2, 10, 99):
        alone().save(tmp_path, step)
    (tmp_path / "step_00000200.partial").mkdir()
    (tmp_path / "notes").mkdir()
    alone().save(tmp_path, 100, keep_last=2, keep_every=5)
    left = ["notes", "step_00000010", "step_00000099", "step_00000100", "step_00000200.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    alone().save(tmp_path, 101, keep_last=5)
    assert len(list(tmp_path.iterdir())) == len(left) + 1


def test_a_damaged_one_of_a_later_step_costs_no_good_one(tmp_path: Path) -> None:
    """The run fell back behind it and goes on saving: what it keeps are its own."""
    for step in (50, 87):
        alone().save(tmp_path, step)
    flip_a_byte(tmp_path / "step_00000087" / "rank_00000.safetensors")
    assert newest_whole(tmp_path) == tmp_path / "step_00000050"
    alone().save(tmp_path, 60, keep_last=1)
    assert newest_whole(tmp_path) == tmp_path / "step_00000060"
    assert not (tmp_path / "step_00000050").exists()


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "never") is None


def test_checkpoints_of_which_none_is_whole_are_no_new_beginning(tmp_path: Path) -> None:
    alone().save(tmp_path, 4)
    flip_a_byte(tmp_path / "step_00000004" / "rank_00000.safetensors")
    with pytest.raises(ValueError, match="none of the 1 checkpoints in .* is whole"):
        newest_whole(tmp_path)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a flipped bit": (lambda f: flip_a_byte(f / "rank_00000.safetensors"), "is damaged"),
    "a cut file": (
        lambda f: (f / "shared.safetensors").write_bytes(b"cut"),
        "shared.safetensors is damaged",
    ),
    "a file gone": (lambda f: (f / "rank_00000.safetensors").unlink(), "is missing"),
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        "manifest.json cannot be read",
    ),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_text('{"step": 5, "fi'),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_damage_is_found_and_the_one_before_taken(
    tmp_path: Path,
    damage: str,
    ranks: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whichever rank checks the damaged file, all ranks go back together."""
    alone().save(tmp_path, 4)
    alone().save(tmp_path, 5)
    spoil, said = DAMAGES[damage]
    spoil(tmp_path / "step_00000005")
    found = FakeRanks(ranks, monkeypatch).run(lambda rank: newest_whole(tmp_path))
    assert found == [tmp_path / "step_00000004"] * ranks
    assert said in caplog.text
    assert "step_00000005" in caplog.text


def test_what_a_killed_save_left_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone().save(tmp_path, 4)
    leftover = tmp_path / "step_00000005.partial"
    leftover.mkdir()
    (leftover / "rank_00000.safetensors").write_bytes(b"half")
    assert newest_whole(tmp_path) == tmp_path / "step_00000004"
    assert not leftover.exists()
    assert f"ignoring {leftover}: the save did not finish" in caplog.text


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    """A run that went back to an earlier checkpoint writes the same steps once more."""
    alone().save(tmp_path)
    pieces = alone()
    pieces.all_shards[0].weight.fill_(-1.0)
    assert pieces.save(tmp_path) == tmp_path / "step_00000005"
    fresh = alone(filled=False)
    restore.load(tmp_path / "step_00000005", fresh.engine, fresh.momentum)
    assert torch.equal(fresh.all_shards[0].weight, torch.full((7,), -1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_is_said_by_name(
    tmp_path: Path,
    failing: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No rank waits for it, no half checkpoint stays, the one before is as it was."""
    alone().save(tmp_path, 4)
    write = checkpoint_files.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if f"rank_{failing:05d}" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    fake = FakeRanks(2, monkeypatch)
    with caplog.at_level(logging.ERROR):
        assert fake.run(lambda rank: Pieces(even_slices(rank, 2)).save(tmp_path)) == [None, None]
    assert f"rank {failing}: OSError: [Errno 28] No space left on device" in caplog.text
    assert "Earlier checkpoints are intact" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
    whole = fake.run(lambda rank: newest_whole(tmp_path))
    assert whole == [tmp_path / "step_00000004"] * 2


@pytest.mark.parametrize(
    ("name", "saved", "here"),
    [("second", 20, 25), ("second", 20, 15), ("new", 0, 2), ("first", 7, 0)],
    ids=["larger", "smaller", "one more", "one less"],
)
def test_another_network_is_refused(
    tmp_path: Path, name: str, saved: int, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller network would fit into what is there: it is refused all the same."""
    alone().save(tmp_path)
    if here:
        monkeypatch.setitem(SIZES, name, here)
    else:
        monkeypatch.delitem(SIZES, name)
    other = alone(filled=False)
    said = f"holds {saved} elements of {name}, the recipe's network {here}: it is of another"
    with pytest.raises(ValueError, match=said):
        restore.load(tmp_path / "step_00000005", other.engine, other.momentum)
    assert not any(shard.weight.any() for shard in other.all_shards)  # nothing was loaded
