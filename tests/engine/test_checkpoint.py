"""Test checkpoints without training: ranks are threads, with a few sliced parameters."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_pieces import (
    FOLLOWED,
    KINDS,
    SIZES,
    Pieces,
    alone,
    even_slices,
    flip_a_byte,
    newest_whole,
    one_stretch,
    place_of,
    state_of,
    values,
)
from fake_ranks import FakeRanks

from blip_scale.engine.checkpoints import restore
from blip_scale.engine.checkpoints.location import Place
from blip_scale.engine.checkpoints.save import RunState
from blip_scale.storage import checkpoint_format


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
    """Every element is loaded, regardless of the rank that saved it."""
    paths = FakeRanks(before, monkeypatch).run(
        lambda rank: Pieces(saved_as(rank, before)).save(tmp_path)
    )
    assert paths == [tmp_path / "step_00000005"] * before
    manifest = json.loads((tmp_path / "step_00000005" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (5, before)
    assert manifest["optimizer_steps"] == 17
    assert len(manifest["files"]) == before + 1

    def load(rank: int) -> tuple[Pieces, RunState]:
        newest = newest_whole(tmp_path)
        assert newest is not None
        pieces = Pieces(loaded_as(rank, after), filled=False)
        return pieces, restore.load(newest, pieces.engine, pieces.momentum)

    covered = {kind: dict.fromkeys(SIZES, 0) for kind in KINDS}
    for pieces, state in FakeRanks(after, monkeypatch).run(load):
        assert (state.step, state.position) == (5, {"seconds": 1.5})
        assert state.task == {"queue": {"pointer": 3}}
        assert torch.equal(state.shared["queue/image"], torch.eye(3))
        assert pieces.refreshed == ["engine", "momentum"]
        for kind, piece, tensor in pieces.tensors():
            expected = values(kind, piece.name)[piece.start : piece.start + piece.numel]
            assert torch.equal(tensor, expected)
            covered[kind][piece.name] += piece.numel
        if pieces.all_slices:
            assert pieces.optimizer.state[pieces.all_slices[0].flat]["step"] == 17
    for kind in KINDS[:3]:
        assert covered[kind] == SIZES
    assert covered["momentum"] == {name: SIZES[name] * (name in FOLLOWED) for name in SIZES}


def test_a_run_without_an_update_has_no_moments(tmp_path: Path) -> None:
    """If all steps were skipped, AdamW has no state, neither before saving nor after loading."""
    pieces = alone()
    pieces.optimizer.state.clear()
    pieces.save(tmp_path)
    fresh = alone(filled=False)
    restore.load(tmp_path / "step_00000005", fresh.engine, fresh.momentum)
    assert not fresh.optimizer.state
    assert torch.equal(fresh.all_slices[1].weight, values("weight", "second"))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Checkpoints of `keep_every` are never removed, and neither are other folders."""
    for step in (1, 2, 10, 99):
        alone().save(tmp_path, step)
    (tmp_path / "step_00000200.partial").mkdir()
    (tmp_path / "notes").mkdir()
    alone().save(tmp_path, 100, keep_last=2, keep_every=5)
    left = ["notes", "step_00000010", "step_00000099", "step_00000100", "step_00000200.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    alone().save(tmp_path, 101, keep_last=5)
    assert len(list(tmp_path.iterdir())) == len(left) + 1


def test_links_and_files_in_place_of_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A symbolic link is removed like an old checkpoint, but its target stays.

    A file in place of a checkpoint is replaced by a save.
    """
    folder, target = tmp_path / "checkpoints", tmp_path / "elsewhere"
    alone().save(folder, 1)
    (folder / "step_00000001").rename(target)
    (folder / "step_00000001").symlink_to(target)
    alone().save(folder, 2)
    for step in (3, 4):
        (folder / f"step_{step:08d}.partial").write_text("not a folder")
    assert newest_whole(folder) == folder / "step_00000002"
    assert not list(folder.glob("*.partial"))
    (folder / "step_00000003.partial").write_text("not a folder")
    assert alone().save(folder, 3, keep_last=2)
    assert [path.name for path in sorted(folder.iterdir())] == ["step_00000002", "step_00000003"]
    assert (target / "manifest.json").exists()
    assert "NOT saved" not in caplog.text


def test_a_checkpoint_that_cannot_be_removed_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        alone().save(tmp_path, step)
    remove = checkpoint_format.remove

    def refuse(path: Path) -> None:
        if path.name == "step_00000001":
            raise PermissionError(13, "Permission denied", str(path))
        remove(path)

    monkeypatch.setattr(checkpoint_format, "remove", refuse)
    assert alone().save(tmp_path, 4, keep_last=1)
    left = ["step_00000001", "step_00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert "an old checkpoint can't be removed: [Errno 13]" in caplog.text


def test_a_damaged_one_of_a_later_step_costs_no_good_one(tmp_path: Path) -> None:
    """A run that resumed before a damaged checkpoint keeps the checkpoints that it saves."""
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
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints in .* is complete"):
        newest_whole(tmp_path)


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
    """All ranks fall back together, regardless of the rank that checks the damaged file."""
    alone().save(tmp_path, 4)
    alone().save(tmp_path, 5)
    spoil, reason = DAMAGES[damage]
    spoil(tmp_path / "step_00000005")
    newest = FakeRanks(ranks, monkeypatch).run(lambda rank: newest_whole(tmp_path))
    assert newest == [tmp_path / "step_00000004"] * ranks
    assert reason in caplog.text
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
    """A run that resumed from an earlier checkpoint saves the same steps again."""
    alone().save(tmp_path)
    pieces = alone()
    pieces.all_slices[0].weight.fill_(-1.0)
    assert pieces.save(tmp_path) == tmp_path / "step_00000005"
    fresh = alone(filled=False)
    restore.load(tmp_path / "step_00000005", fresh.engine, fresh.momentum)
    assert torch.equal(fresh.all_slices[0].weight, torch.full((7,), -1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_is_said_by_name(
    tmp_path: Path,
    failing: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No rank waits for the failed rank, and no incomplete checkpoint remains.

    The previous checkpoint is unchanged.
    """
    alone().save(tmp_path, 4)
    write = checkpoint_format.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if f"rank_{failing:05d}" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_format, "save_file", full)
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
    """A smaller network is also refused, although its tensors would fit into the checkpoint's."""
    alone().save(tmp_path)
    if here:
        monkeypatch.setitem(SIZES, name, here)
    else:
        monkeypatch.delitem(SIZES, name)
    other = alone(filled=False)
    message = f"holds {saved} elements of {name}, the recipe's network {here}: it is of another"
    with pytest.raises(ValueError, match=message):
        restore.load(tmp_path / "step_00000005", other.engine, other.momentum)
    assert not any(piece.weight.any() for piece in other.all_slices)  # nothing was loaded


def test_another_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("text.embeddings.word.weight", 24), ("text.embeddings.norm.weight", 2)):
        monkeypatch.setitem(SIZES, name, size)
    alone().save(tmp_path)
    monkeypatch.setitem(SIZES, "text.embeddings.word.weight", 26)
    other = alone(filled=False)
    with pytest.raises(ValueError, match=r"of 12 tokens .* has 13: .* model\.text\.tokenizer"):
        restore.load(tmp_path / "step_00000005", other.engine, other.momentum)


def test_training_goes_on_while_a_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint does not contain later changes of weights, queue and history."""
    begun, may_write = threading.Event(), threading.Event()
    write = checkpoint_format.save_file

    def slow(tensors: Any, path: Path, metadata: Any) -> None:
        begun.set()
        assert may_write.wait(60)
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_format, "save_file", slow)
    pieces = alone()
    saver, state = pieces.saver(place_of(tmp_path)), state_of(5)
    saver.begin(state)
    assert begun.wait(60)
    for _, _, tensor in pieces.tensors():
        tensor.fill_(-1.0)
    state.shared["queue/image"].zero_()
    state.position["seconds"] = 99.0
    state.task["queue"]["pointer"] = 99
    saver.poll()
    assert saver.newest == 0 and not (tmp_path / "step_00000005").exists()
    may_write.set()
    assert saver.finish() and saver.newest == 5
    fresh = alone(filled=False)
    restored = restore.load(tmp_path / "step_00000005", fresh.engine, fresh.momentum)
    for kind, piece, tensor in fresh.tensors():
        assert torch.equal(tensor, values(kind, piece.name)), f"{kind} {piece.name}"
    assert (restored.position, restored.task) == (state_of(5).position, state_of(5).task)
    assert torch.equal(restored.shared["queue/image"], torch.eye(3))
    assert pieces.curves[5].keys() == {"checkpoint/pause_s", "checkpoint/write_s"}


def test_one_save_follows_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll commits a checkpoint once all ranks have written it.

    A save that begins before that waits for the commit.
    """

    def run(rank: int) -> list[int]:
        saver = Pieces(even_slices(rank, 2)).saver(place_of(tmp_path))
        saver.begin(state_of(1))
        while saver.newest < 1:
            saver.poll()
        saver.begin(state_of(2))
        saver.begin(state_of(3))
        seen = [saver.newest]
        assert saver.finish()
        return [*seen, saver.newest]

    assert FakeRanks(2, monkeypatch).run(run) == [[2, 3]] * 2
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("ranks", [2, 1])
def test_every_node_has_a_disk_of_its_own(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node commits its part of the checkpoint, and resumes from it.

    A different number of ranks would need the parts of all nodes.
    """

    def place(rank: int) -> Place:
        return place_of(tmp_path / str(rank), is_shared=False)

    def save(rank: int) -> None:
        saver = Pieces(even_slices(rank, 2)).saver(place(rank))
        saver.begin(state_of(5))
        assert saver.finish()

    FakeRanks(2, monkeypatch).run(save)
    for rank in range(2):
        names = {path.name for path in (tmp_path / str(rank) / "step_00000005").iterdir()}
        assert names == {f"rank_{rank:05d}.safetensors", "shared.safetensors", "manifest.json"}

    def go_on(rank: int) -> None:
        newest = restore.newest_whole(place(rank), stage=3)
        assert newest is not None
        pieces = Pieces(even_slices(rank, ranks), filled=False)
        restore.load(newest, pieces.engine, pieces.momentum)
        for kind, piece, tensor in pieces.tensors():
            expected = values(kind, piece.name)[piece.start : piece.start + piece.numel]
            assert torch.equal(tensor, expected)

    if ranks == 2:
        FakeRanks(2, monkeypatch).run(go_on)
    else:
        with pytest.raises(ValueError, match="none of the 1 checkpoints"):
            FakeRanks(1, monkeypatch).run(go_on)
