"""Test a run whose batch size and streams change when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_runs

from blip_scale.config import recipe as recipes
from blip_scale.engine.schedule import learning_rate

pytestmark = pytest.mark.multiprocess


def ids_by_step(run: Path) -> dict[int, list[str]]:
    lines = (run / "samples" / "rank_0.jsonl").read_text().splitlines()
    return {entry["step"]: entry["ids"] for entry in map(json.loads, lines)}


def test_no_sample_is_lost_or_seen_twice(tmp_path: Path) -> None:
    """Run three steps of 16 from 64 samples, then steps of 8 with 16 more samples per epoch."""
    recipe = tiny_runs.make_recipe(tmp_path, log={"sample_ids": True})
    run = tmp_path / "run"
    tiny_runs.train(recipe, 1, "train.max_steps=3")
    streams = [
        {"name": "shapes", "local": str(tmp_path / "shapes")},
        {"name": "more", "local": str(tmp_path / "heldout")},
    ]
    train = {"global_batch_size": 8, "epochs": 2, "max_steps": None}
    recipe = tiny_runs.make_recipe(
        tmp_path, log={"sample_ids": True}, data={"streams": streams}, train=train
    )
    option = "--allow-change"
    assert tiny_runs.finish(tiny_runs.launch(recipe, 1, option, "data.streams")) == [2]
    refusal = "global_batch_size was 16 and is 8 now; undo the change, allow it with "
    assert f"{refusal}--allow-change train.global_batch_size" in tiny_runs.said(recipe)
    tiny_runs.train(recipe, 1, option, "data.streams", option, "train.global_batch_size")

    by_step = ids_by_step(run)
    assert list(by_step) == list(range(1, 3 + 2 + 10 + 1))
    first = [name for step in range(1, 6) for name in by_step[step]]
    second = [name for step in range(6, 16) for name in by_step[step]]
    shapes = {record.id for record in tiny_runs.records("shapes")}
    more = {record.id for record in tiny_runs.records("heldout")[::4]}
    assert len(first) == 64 and set(first) == shapes
    assert len(second) == 80 and set(second) == shapes | more

    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = [point for point in points if "loss/total" in point]
    assert [point["samples"] for point in points[-3:]] == [128, 136, 144]
    optimizer = recipes.load(str(recipe)).optimizer
    # An epoch has ten steps with the new batch size and mixture. Steps 4 and 5 are the last two of
    # the first epoch.
    for step, scheduled in ((4, 8), (5, 9), (6, 10), (15, 19)):
        expected = learning_rate(optimizer, scheduled, 10, 2)
        assert points[step - 1]["train/learning_rate"] == pytest.approx(expected)
    output = tiny_runs.said(recipe)
    assert "changed since the previous start: recipe.train.global_batch_size: 16 -> 8" in output
    assert "at sample 48: train.global_batch_size: global_batch_size was 16 and is 8 now" in output
    start = json.loads((run / "manifest.json").read_text())["attempts"][-1]
    assert start["allowed_changes"] == ["data.streams", "train.global_batch_size"]
    assert "recipe.train.global_batch_size: 16 -> 8" in start["changed"]
