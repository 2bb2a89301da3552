"""Checkpoints of other versions of this code: read on purpose, or refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_pieces import alone, newest_whole, values

from blip_scale.engine import run
from blip_scale.engine.checkpoints import restore
from blip_scale.engine.run import History
from blip_scale.interop.checkpoints import read_checkpoint
from blip_scale.storage import checkpoint_format
from blip_scale.storage.checkpoint_format import Manifest, UnknownVersionError

# The position of a checkpoint that was saved before the format had a version.
OLDER_POSITION = """{
 "seconds": 12.5, "skipped_samples": 3, "skipped_steps": 2, "skipped_in_a_row": 1,
 "window": [{"loss/total": 7.25, "step_s": 0.5, "blocked_s": 0.1, "data_wait_s": 0.01}],
 "usual": [7.5, 7.25], "is_spiking": true,
 "first": {"loss/total": 9.0}, "last": {"loss/total": 7.25},
 "evaluation": {"heldout/i2t_r1": 25.0},
 "captions": [{"set": "heldout", "generated": "a disc", "true": "a big disc"}],
 "best": {"step": 40, "score": 25.0}
}"""


OLDER = (
    "convert it to .pth with the blip_scale that wrote it, and start from that with "
    "model.checkpoint"
)


def change_manifest(folder: Path, **fields: Any) -> None:
    """Set fields of manifest.json; None removes one."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: v for name, v in content.items() if v is not None}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of step 5, after one of step 4."""
    alone().save(tmp_path, 4)
    path = alone().save(tmp_path, 5)
    assert path is not None
    return path


def test_the_manifest_says_the_version(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    assert json.loads(text)["format_version"] == 1
    assert Manifest.from_json(text).to_json() == text


def test_a_checkpoint_without_a_version_is_version_1(checkpoint: Path) -> None:
    change_manifest(checkpoint, format_version=None, frozen=None)
    assert newest_whole(checkpoint.parent) == checkpoint
    fresh = alone(filled=False)
    state = restore.load(checkpoint, fresh.engine, fresh.momentum)
    assert (state.step, state.position) == (5, {"seconds": 1.5})
    (second,) = [piece for piece in fresh.all_slices if piece.name == "second"]
    assert torch.equal(second.weight, values("weight", "second"))


@pytest.mark.parametrize(
    ("version", "reads", "advice"),
    [
        (2, 1, "update blip_scale"),
        (1, 2, OLDER),
        (None, 2, OLDER),
        ("new", 1, OLDER),
    ],
)
def test_another_version_is_refused(
    checkpoint: Path, version: Any, reads: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run doesn't fall back behind it: it would train anew, and replace, what is there."""
    monkeypatch.setattr(checkpoint_format, "FORMAT_VERSION", reads)
    change_manifest(checkpoint, format_version=version)
    message = (
        rf"^{checkpoint}: the checkpoint has format version {version or 1}, this blip_scale reads "
        rf"version {reads}: {advice}$"
    )
    with pytest.raises(UnknownVersionError, match=message):
        newest_whole(checkpoint.parent)
    with pytest.raises(UnknownVersionError, match=message):
        fresh = alone(filled=False)
        restore.load(checkpoint, fresh.engine, fresh.momentum)
    (checkpoint / checkpoint_format.NETWORK).write_text(NETWORK)
    with pytest.raises(UnknownVersionError, match=message):
        read_checkpoint(checkpoint)


NETWORK = json.dumps(
    {
        "vision": {"name": "vit_tiny_patch16_224", "image_size": 32},
        "text": {"special": {"pad": 0, "cls": 1, "sep": 2, "enc": 3, "dec": 4}},
    }
)


def test_an_older_history_is_read_whole() -> None:
    position = json.loads(OLDER_POSITION)
    history = History.from_checkpoint(position)
    for name, value in position.items():
        assert getattr(history, name) == value, name


def test_a_field_that_a_checkpoint_lacks_has_its_default() -> None:
    position = json.loads(OLDER_POSITION)
    del position["best"], position["skipped_steps"]
    history = History.from_checkpoint(position)
    assert (history.best, history.skipped_steps, history.seconds) == ({}, 0, 12.5)
    assert asdict(History.from_checkpoint({})) == asdict(History())


def test_a_field_that_nobody_knows_is_refused() -> None:
    position = json.loads(OLDER_POSITION) | {"mood": "good", "hour": 3}
    with pytest.raises(ValueError, match=r"history has hour, mood, which this blip_scale doesn't"):
        History.from_checkpoint(position)


def test_a_renamed_field_keeps_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run._RENAMED, "elapsed", "seconds")
    position = json.loads(OLDER_POSITION)
    position["elapsed"] = position.pop("seconds")
    assert History.from_checkpoint(position).seconds == 12.5
