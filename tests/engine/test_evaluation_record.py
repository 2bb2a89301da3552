"""The record of an evaluation is valid for one checkpoint, and for the settings that affect it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip_scale.config import recipe as recipes
from blip_scale.engine.watching.evaluation_record import EvaluationRecord
from blip_scale.storage import files

RESULTS = {"seconds": 3.5, "evaluation": {"heldout/r1": 0.25}, "captions": [], "best": {}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


def record(folder: Path, *overrides: str) -> EvaluationRecord:
    return EvaluationRecord(recipes.load("demo", [f"output_dir={folder}", *overrides]))


def test_a_record_is_read_for_its_checkpoint_alone(tmp_path: Path, checkpoint: Path) -> None:
    assert record(tmp_path).read(checkpoint, False) is None
    record(tmp_path).write(checkpoint, False, RESULTS)
    assert record(tmp_path).read(checkpoint, False) == RESULTS
    assert record(tmp_path).read(checkpoint, True) is None, "at the end everything is measured"
    record(tmp_path).write(tmp_path / "lost", True, {})  # the save failed: nothing to record
    (checkpoint / "manifest.json").write_text('{"of": "weights that were trained again"}')
    assert record(tmp_path).read(checkpoint, False) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("evaluation.every_steps=7", RESULTS),
        ("evaluation.max_pairs=3", None),
        ("data.heldout=[{name: other, local: /data/other}]", None),
    ],
)
def test_settings_that_decide_the_figures_must_be_equal(
    tmp_path: Path, checkpoint: Path, change: str, expected: dict[str, Any] | None
) -> None:
    record(tmp_path).write(checkpoint, True, RESULTS)
    assert record(tmp_path, change).read(checkpoint, False) == expected


@pytest.mark.parametrize("damage", ["torn", "other format", "other type"])
def test_a_record_that_cannot_be_used_costs_an_evaluation(
    tmp_path: Path, checkpoint: Path, damage: str
) -> None:
    record(tmp_path).write(checkpoint, True, RESULTS)
    file = tmp_path / "evaluation.json"
    text = file.read_text()
    newer = json.dumps(json.loads(text) | {"format": 2})
    file.write_text({"torn": text[:-9], "other format": newer, "other type": "[1]"}[damage])
    assert record(tmp_path).read(checkpoint, True) is None


def test_a_line_of_the_curves_counts_once_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert not files.has_line(file, 4, ["a/b"])
    files.add_line(file, 3, {"a/b": 1.0})
    files.add_line(file, 4, {"other": 1.0})
    with file.open("a") as stream:
        stream.write('{"step": 4, "a/b": 1')
    assert not files.has_line(file, 4, ["a/b"])
    files.take_back(file, 4)
    files.add_line(file, 4, {"a/b": 1.0})
    assert files.has_line(file, 4, ["a/b"])
