"""Checkpoints of other versions of the format are either supported, or refused in one sentence."""

from __future__ import annotations

import json
import os
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

# Position in a checkpoint that was saved before the format had a version.
OLDER_POSITION = """{
 "seconds": 12.5, "skipped_samples": 3, "skipped_steps": 2, "skipped_in_a_row": 1,
 "window": [{"loss/total": 7.25, "step_s": 0.5, "blocked_s": 0.1, "data_wait_s": 0.01}],
 "usual": [7.5, 7.25], "is_spiking": true,
 "first": {"loss/total": 9.0}, "last": {"loss/total": 7.25},
 "evaluation": {"heldout/i2t_r1": 25.0},
 "captions": [{"set": "heldout", "generated": "a disc", "true": "a big disc"}],
 "best": {"step": 40, "score": 25.0}
}"""


def as_version_1(folder: Path, **fields: Any) -> None:
    """Rewrite manifest.json as in version 1, without a checksum. None removes a field."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text()) | {"format_version": 1, "checksum": None} | fields
    file.write_text(json.dumps({name: v for name, v in content.items() if v is not None}, indent=1))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Save checkpoints of steps 4 and 5, and return the path of the second."""
    alone().save(tmp_path, 4)
    path = alone().save(tmp_path, 5)
    assert path is not None
    return path


def test_the_manifest_says_the_version(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    assert json.loads(text)["format_version"] == 2
    assert Manifest.from_json(text).to_json() == text


@pytest.mark.parametrize("fields", [{}, {"format_version": None, "frozen": None}])
def test_a_checkpoint_of_version_1_is_read(checkpoint: Path, fields: dict[str, Any]) -> None:
    """Early checkpoints of version 1 have no version field, and are also read."""
    as_version_1(checkpoint, **fields)
    assert newest_whole(checkpoint.parent) == checkpoint
    fresh = alone(filled=False)
    state = restore.load(checkpoint, fresh.engine, fresh.momentum)
    assert (state.step, state.position) == (5, {"seconds": 1.5})
    (second,) = [piece for piece in fresh.all_slices if piece.name == "second"]
    assert torch.equal(second.weight, values("weight", "second"))


def test_a_newer_version_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run does not fall back to an older checkpoint, because it would replace the newer one."""
    manifest = checkpoint_format.read_manifest(checkpoint)
    with monkeypatch.context() as newer:
        newer.setattr(checkpoint_format, "FORMAT_VERSION", 3)
        (checkpoint / "manifest.json").write_text(manifest.to_json())
    message = (
        rf"^{checkpoint}: the checkpoint has format version 3, this blip_scale reads versions 1 to "
        r"2: update blip_scale$"
    )
    with pytest.raises(UnknownVersionError, match=message):
        newest_whole(checkpoint.parent)
    with pytest.raises(UnknownVersionError, match=message):
        fresh = alone(filled=False)
        restore.load(checkpoint, fresh.engine, fresh.momentum)
    (checkpoint / checkpoint_format.NETWORK).write_text(NETWORK)
    with pytest.raises(UnknownVersionError, match=message):
        read_checkpoint(checkpoint)


def test_no_flipped_bit_of_a_manifest_is_taken(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every single bit is flipped: in values, keys, version and checksum, or to invalid UTF-8."""
    file = checkpoint / "manifest.json"
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r".") as refused:
            Manifest.from_json(flipped.decode(errors="replace"))
        assert not isinstance(refused.value, UnknownVersionError), bit
    spoilt = content.replace(b'"format_version": 2', b'"format_version": 3')
    file.write_bytes(spoilt)
    assert newest_whole(checkpoint.parent) == checkpoint.parent / "step_00000004"
    assert "its checksum does not match its content" in caplog.text


DAMAGED_FIELDS: dict[str, dict[str, Any]] = {
    "a number that is a text": {"step": "5"},
    "a step that isn't the folder's": {"step": 4},
    "a version that has a checksum": {"format_version": 3},
    "an unknown field": {"frozeo": []},
    "a path": {"files": {"../../outside": {"bytes": 1, "xxh3": ""}}},
    "a list for an object": {"files": ["rank_00000.safetensors"]},
    "a size below zero": {"parameters": {"first": -7}},
    "files of fewer ranks": {"world_size": 2},
    "files of no rank": {"files": {}},
}


@pytest.mark.parametrize("damage", DAMAGED_FIELDS)
def test_a_damaged_manifest_of_version_1_costs_its_checkpoint_alone(
    checkpoint: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    as_version_1(checkpoint, **DAMAGED_FIELDS[damage])
    assert newest_whole(checkpoint.parent) == checkpoint.parent / "step_00000004"
    assert f"ignoring {checkpoint}: manifest.json" in caplog.text
    assert not (checkpoint.parent.parent / "outside").exists()


def test_a_manifest_that_cannot_be_read_costs_its_checkpoint_alone(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").mkdir()
    assert newest_whole(checkpoint.parent) == checkpoint.parent / "step_00000004"


def test_deep_nesting_is_damage() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        Manifest.from_json("[" * 100_000)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = alone().save(tmp_path)
    finally:
        os.umask(before)
    assert path is not None
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


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
