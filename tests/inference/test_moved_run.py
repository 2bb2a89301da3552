"""A run's folder is whole: on another machine, without the data and the text checkpoint that it was
trained with, it answers and is exported; and others can read what was exported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_runs
from transformers import BertConfig, BertModel

from blip_scale.commands import convert_checkpoint, predict

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, away from what it was made with."""
    here = tmp_path_factory.mktemp("here")
    bert = here / "bert"
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 96, "max_position_embeddings": 40, "vocab_size": 23,
    }  # fmt: skip
    BertModel(BertConfig(**sizes)).save_pretrained(bert)
    recipe = tiny_runs.make_recipe(
        here, train={"max_steps": 1}, model={"text": {"checkpoint": str(bert), "layers": None}}
    )
    tiny_runs.train(recipe)
    there = tmp_path_factory.mktemp("there") / "run"
    shutil.move(here / "run", there)
    shutil.rmtree(here)
    return there


def test_it_answers(moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "disc.png"
    image.write_bytes(tiny_runs.picture("red", "disc", big=True))
    assert predict.main(["caption", "--model", str(moved), str(image)]) == 0, (
        capsys.readouterr().err
    )


def test_it_is_exported_readable_and_with_its_alarms(moved: Path, tmp_path: Path) -> None:
    file = moved / "summary.json"
    summary = json.loads(file.read_text())
    assert summary["alarms"] == {}
    alarm = {"message": "ITM gives every pair the same answer", "points": 12}
    file.write_text(json.dumps(summary | {"alarms": {"itm_one_class": alarm}}))
    out = tmp_path / "exported"
    umask = os.umask(0o027)
    try:
        assert convert_checkpoint.main([str(moved), str(out)]) == 0
    finally:
        os.umask(umask)
    modes = {path: path.stat().st_mode & 0o777 for path in [out, *out.rglob("*")]}
    assert modes == {path: 0o750 if path.is_dir() else 0o640 for path in modes}
    line = "- ITM gives every pair the same answer (`alarm/itm_one_class`, for the last 12 logged"
    assert line in (out / "README.md").read_text()
