"""`train.max_micro_batch_size: auto` is resolved once, is equal on all ranks, and is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml

from blip_scale.commands import micro_batch
from blip_scale.config import checks, recipe
from blip_scale.config.batch_sizes import possible_micro_batches
from blip_scale.planning.memory import HEADROOM, memory, roomy_micro_batch
from blip_scale.tasks.pretrain import Pretrain

ZERO3 = tiny_runs.REPO / "ds_configs" / "zero3.json"
AUTO = {"train": {"max_micro_batch_size": "auto", "max_steps": 1}}


def settings_of_the_run(file: Path) -> dict[str, object]:
    """Return the section `train` of the recipe written by the run."""
    kept = yaml.safe_load((file.parent / "run" / "recipe.yaml").read_text())
    return dict(kept["train"])


@pytest.mark.multiprocess
def test_a_run_settles_its_micro_batch_once(tmp_path: Path) -> None:
    """With enough memory, the micro-batch is a rank's whole part of the global batch.

    A resumed run keeps this size. With a different number of ranks, it takes a size that divides.
    """
    file = tiny_runs.make_recipe(tmp_path, **AUTO)
    assert tiny_runs.finish(tiny_runs.launch(file, 2)) == [0, 0], tiny_runs.said(file)
    output = tiny_runs.said(file)
    assert output.count("auto takes 8 pairs a micro-batch, 1 micro-steps: the largest that") == 1
    assert settings_of_the_run(file)["max_micro_batch_size"] == 8
    again = tiny_runs.launch(file, 1, "train.max_steps=2")
    assert tiny_runs.finish(again) == [0], tiny_runs.said(file)
    assert "auto takes 8 pairs a micro-batch, 2 micro-steps: as this run" in tiny_runs.said(file)
    assert len(tiny_runs.losses(tmp_path / "run")) == 2


@pytest.mark.multiprocess
def test_a_run_without_room_is_refused_by_all_ranks(tmp_path: Path) -> None:
    """If the loader workers need all memory, no micro-batch fits."""
    file = tiny_runs.make_recipe(tmp_path, **AUTO)
    codes = tiny_runs.finish(tiny_runs.launch(file, 2, "data.workers=1024"))
    assert 2 in codes, tiny_runs.said(file)
    assert (
        "auto finds no size that fits: a micro-batch of 2 does not fit 0.0 GiB"
        in tiny_runs.said(file)
    )


def test_the_largest_that_fits_with_headroom(tmp_path: Path) -> None:
    file = tiny_runs.make_recipe(tmp_path, train={"global_batch_size": 36})
    chosen = recipe.load(str(file), ["train.max_micro_batch_size=auto"])
    ds_config = checks.resolve_deepspeed(chosen, ZERO3, 1)
    load = micro_batch.load_of(chosen, ds_config, 1, "cpu", 2.0**40)
    possible = possible_micro_batches(chosen, 1)
    assert possible == [2, 3, 4, 6, 9, 12, 18, 36]
    for size in possible:
        limit = memory(load, size).total / (1 - HEADROOM)
        assert roomy_micro_batch(load, possible, limit * 1.0001) == size
        assert roomy_micro_batch(load, possible, limit * 0.9999) < size
    with pytest.raises(ValueError, match="auto was not resolved"):
        Pretrain(chosen, torch.device("cpu"))


def test_auto_is_for_tasks_whose_memory_is_modelled(tmp_path: Path) -> None:
    file = tiny_runs.make_recipe(tmp_path, **AUTO)
    checks.check(recipe.load(str(file)), 2)
    with pytest.raises(ValueError, match="max_micro_batch_size: auto supports pretrain and"):
        checks.check(recipe.load(str(file), ["task=captioning"]), 2)
    stated = recipe.load(str(file), ["train.micro_batch_size=4"])
    assert micro_batch.auto(stated, ZERO3) is None, "what is stated holds"
    with pytest.raises(ValueError, match=r"max_micro_batch_size: expected .*auto.*found"):
        recipe.load(str(file), ["train.max_micro_batch_size=most"])


def test_a_damaged_recipe_of_an_earlier_start_is_passed_over(tmp_path: Path) -> None:
    file = tiny_runs.make_recipe(tmp_path, **AUTO)
    chosen = recipe.load(str(file))
    kept = tmp_path / "run" / "recipe.yaml"
    kept.parent.mkdir()
    for text in ("train: [", "train: 3\n", "[]\n", "", "train: {max_micro_batch_size: auto}\n"):
        kept.write_text(text)
        assert micro_batch.micro_batch_before(chosen) is None, text
    kept.write_text("train: {max_micro_batch_size: 4, no_longer_known: 1}\n")
    assert micro_batch.micro_batch_before(chosen) == 4
