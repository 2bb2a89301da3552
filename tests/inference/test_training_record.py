"""What a checkpoint tells of its training: the files of a run, the card of its export, and files
that are damaged or hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_blip
import yaml

from blip_scale.commands import convert_checkpoint
from blip_scale.commands.page_service import Service
from blip_scale.inference.loading import load_blip
from blip_scale.inference.training_record import (
    TrainingRecord,
    record_of_card,
    training_record,
)

STREAMS = {"photos": 900, "web": 12000}
FIGURES = {"heldout/itc_image_to_text_r1": 0.25, "heldout/candidates": 512.0}
ALARM = "ITM gives every pair the same answer (0.5)"
EVIL = '<img src="http://evil.example/a.png" onerror="alert(1)">'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that ended, with figures and an alarm."""
    folder = tiny_blip.make_run(tmp_path / "run", tiny_blip.vocabulary(tmp_path / "vocabulary"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["streams"] = [{"name": name, "local": f"data/{name}"} for name in STREAMS]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write(folder, FIGURES | {"heldout/broken": None})
    return folder


def write(folder: Path, figures: dict[str, Any], steps: int = tiny_blip.STEP) -> None:
    alarms = {"itm_one_class": {"message": ALARM, "points": 12}}
    summary = {"steps": steps, "evaluation": figures, "alarms": alarms}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_run_tells_of_its_training(run: Path) -> None:
    record = training_record(run)
    assert record is not None and (record.steps, record.alarms) == (tiny_blip.STEP, (ALARM,))
    assert record.figures == FIGURES
    assert record.pairs == tiny_blip.STEP * (record.pairs_per_step or 0) > 0
    assert record.data == dict.fromkeys(STREAMS)
    streams = [{"name": name, "samples": count} for name, count in STREAMS.items()]
    manifest = {"state": {"data": streams}, "attempts": [], "checkpoints": []}
    (run / "manifest.json").write_text(json.dumps(manifest))
    record = training_record(run)
    assert record is not None
    assert record.data == STREAMS


def test_figures_are_those_of_the_last_checkpoint_alone(run: Path) -> None:
    write(run, FIGURES, steps=tiny_blip.STEP + 1)
    record = training_record(run)
    assert record is not None and not record.figures and not record.alarms


def test_an_export_tells_the_same(run: Path, tmp_path: Path) -> None:
    expected = training_record(run)
    assert expected is not None
    for name, arguments in (("captioner", ()), ("all", ("--head", "all"))):
        assert convert_checkpoint.main([str(run), str(tmp_path / name), *arguments]) == 0
        record = training_record(tmp_path / name)
        assert record is not None
        assert (record.steps, record.pairs_per_step) == (expected.steps, expected.pairs_per_step)
        assert (record.data, record.figures) == (expected.data, expected.figures)
        assert record.alarms == (ALARM,)


def test_what_cannot_be_read_is_left_out(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ("{", "[]", '{"steps": 7, "evaluation": [], "alarms": 3}'):
        (run / "summary.json").write_text(content)
        (run / "manifest.json").write_text('{"state": {"data": [3, {"name": []}]}}')
        record = training_record(run)
        assert record is not None and not record.figures and not record.alarms
    assert "summary.json cannot be read" in caplog.text
    assert training_record(run.parent / "nowhere.pth") is None
    assert record_of_card("# A card\n\n| a | b |\n") is None


def test_a_hostile_card_is_text(run: Path, tmp_path: Path) -> None:
    """Names and messages of a stranger appear on the page as they are written."""
    pytest.importorskip("gradio")
    from blip_scale.commands.page_layout import about

    card = (
        f"## Training\n\n| | |\n|---|---|\n| data | {EVIL} |\n| steps | 7 |\n\n"
        f"## Held-out figures\n\n| {EVIL}/r1 | 0.5 |\n\n"
        f"## Warnings at the end of training\n\n- {EVIL}\n"
    )
    record = record_of_card(card)
    assert record == TrainingRecord(7, None, {EVIL: None}, {f"{EVIL}/r1": 0.5}, (EVIL,))
    page = about(Service([load_blip(run)], [], records=[record]))
    assert page.count("&lt;img src=") == 3 and "<img" not in page
    assert "for 7 steps" in page
