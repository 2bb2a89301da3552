"""Losses that a recipe chooses, in the real engine: contrasts without momentum encoders and queue,
and networks without ITM or LM."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip_scale.commands import convert_checkpoint
from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe
from blip_scale.engine.schedule import learning_rate
from blip_scale.inference.inputs import to_model_input
from blip_scale.inference.loading import load_blip
from blip_scale.storage.checkpoint_format import Manifest
from blip_scale.tasks.by_name import TASKS
from blip_scale.tasks.contrastive_task import ContrastiveTask

BIAS = -1.5


def recipe_of(folder: Path, task: str, contrast: str) -> Path:
    """Recipe without dropout, and with a queue that is too small for the global batch."""
    return tiny_runs.make_recipe(
        folder,
        task=task,
        model={"text": {"dropout": 0.0}},
        objective={"itc": contrast, "queue_size": 4, "sigmoid_bias": BIAS},
        train={"max_steps": 2},
        checkpoint={"every_steps": 1},
        optimizer={"weight_decay": 0.1},
    )


def task_of(recipe: Recipe) -> ContrastiveTask:
    task = TASKS[recipe.task](recipe, torch.device("cpu"))
    assert isinstance(task, ContrastiveTask)
    return task


def loss_written_out(scores: Tensor, matches: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's formula, pair by pair: log(1 + exp(-z (score + bias))), z = 1 for a match, else
    -1."""
    terms = []
    for row, others in zip(scores, matches, strict=True):
        for score, match in zip(row, others, strict=True):
            sign = 1.0 if match else -1.0
            terms.append(torch.log1p(torch.exp(-sign * (score + bias))))
    return torch.stack(terms).sum() / len(scores)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["pretrain", "retrieval"])
def test_a_contrast_without_momentum_encoders_and_queue_trains(tmp_path: Path, name: str) -> None:
    """Loss of the first step and the bias after it against the formula; nothing of momentum in
    network, checkpoint and log."""
    file = recipe_of(tmp_path, name, "sigmoid")
    codes = tiny_runs.finish(tiny_runs.launch(file, 1))
    assert codes == [0], tiny_runs.said(file)

    recipe = recipes.load(str(file))
    task = task_of(recipe)
    network = task.build_network()
    assert not task.momentum_pairs
    assert not [name for name, _ in network.named_parameters() if "momentum" in name]
    weights = task.initial_weights()
    assert set(weights) == {name for name, _ in network.named_parameters()}
    network.load_state_dict(
        {name: w.view_as(network.get_parameter(name)) for name, w in weights.items()}, strict=False
    )
    batch = next(task.batches())
    images, text = to_model_input(batch, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        image = network.med.project_image(network.med.encode_image(images))
        scores = image @ network.med.project_text(network.med.encode_text(text)).T
        scores = scores / recipe.objective.temperature
    bias = torch.tensor([BIAS], requires_grad=True)
    settings = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [bias],
        learning_rate(settings, 0, task.steps_per_epoch),
        settings.betas,
        settings.eps,
        settings.weight_decay,
    )
    loss = loss_written_out(scores, torch.eye(len(scores)), bias)
    loss.backward()
    optimizer.step()

    losses = tiny_runs.losses(tmp_path / "run")
    assert list(losses) == [1, 2]
    assert losses[1]["loss/itc"] == pytest.approx(loss.item(), rel=1e-5)
    assert all(math.isfinite(value) for value in losses[2].values())
    checkpoints = tmp_path / "run" / "checkpoints"
    first = tiny_runs.whole_tensors(checkpoints / "step_00000001", "weight")
    assert first.keys() == weights.keys()
    torch.testing.assert_close(first["contrast.bias.value"], bias.detach(), rtol=1e-6, atol=0)
    assert bias.item() != BIAS
    assert not tiny_runs.whole_tensors(checkpoints / "step_00000001", "momentum")
    manifest = json.loads((checkpoints / "step_00000002" / "manifest.json").read_text())
    assert set(manifest["task"]) == {"loader", "objective"}
    with safe_open(checkpoints / "step_00000002" / "shared.safetensors", "pt") as shared:
        assert not list(shared.keys())
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"itc/in_batch_i2t"' in logged
    for figure in ("queue/", "momentum/", "train/alpha"):
        assert figure not in logged


@pytest.mark.multiprocess
@pytest.mark.parametrize("contrast", ["in_batch", "sigmoid"])
def test_two_ranks_equal_one_with_the_same_global_batch(tmp_path: Path, contrast: str) -> None:
    """Pairs of all ranks count, so ranks change neither losses nor weights, and nor does a resume.

    The first step has smaller images. ITM and LM would differ: a rank draws negatives with a seed
    of its own, and takes the mean over its tokens.
    """
    alone, whole, halves = (tmp_path / name for name in ("alone", "whole", "halves"))
    for folder, ranks, ends in ((alone, 1, (2,)), (whole, 2, (2,)), (halves, 2, (1, 2))):
        folder.mkdir()
        file = recipe_of(folder, "pretrain", contrast)
        (folder / "losses.csv").write_text("epoch,itc\n0,2.5\n1,1.5\n")
        for steps in ends:
            arguments = (
                f"train.max_steps={steps}", "objective.itm=none", "objective.lm=none",
                "data.image_sizes=[{size: 16, until_epoch: 0.25}]",
                f"log.reference={folder / 'losses.csv'}",
            )  # fmt: skip
            codes = tiny_runs.finish(tiny_runs.launch(file, ranks, *arguments))
            assert codes == [0] * ranks, tiny_runs.said(file)
    losses = [tiny_runs.losses(folder / "run") for folder in (alone, whole, halves)]
    assert losses[1] == losses[2]
    lines = (halves / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "speed/mfu" in line]
    assert ["reference/itc" in line for line in logged] == [False, True], "from the middle on"
    assert logged[1]["reference/itc"] == 2.5 and logged[1]["alarm/reference_itc"] == 0
    for step in (1, 2):
        assert set(losses[0][step]) == {"loss/total", "loss/itc"}
        assert losses[1][step] == pytest.approx(losses[0][step], abs=2e-5), step
    for kind in ("weight", "exp_avg"):
        ends = [
            tiny_runs.whole_tensors(folder / "run" / "checkpoints" / "step_00000002", kind)
            for folder in (alone, whole, halves)
        ]
        assert ends[0].keys() == ends[1].keys() == ends[2].keys()
        assert ("contrast.bias.value" in ends[0]) == (contrast == "sigmoid")
        for name, tensor in ends[1].items():
            assert torch.equal(tensor, ends[2][name]), name
            torch.testing.assert_close(tensor, ends[0][name], rtol=1e-4, atol=2e-5, msg=name)


def recipe_of_losses(folder: Path, **objective: Any) -> Path:
    """Recipe of a run of one step with some losses left out. Negatives come from all ranks."""
    return tiny_runs.make_recipe(
        folder,
        model={"text": {"dropout": 0.0}},
        objective={"itm": "global", **objective},
        train={"max_steps": 1},
        evaluation={"captions": 2},
    )


@pytest.fixture(scope="module")
def all_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Losses of the first step of a run that has all of them."""
    folder = tmp_path_factory.mktemp("everything")
    file = recipe_of_losses(folder)
    assert tiny_runs.finish(tiny_runs.launch(file, 1)) == [0], tiny_runs.said(file)
    return tiny_runs.losses(folder / "run")[1]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("itm", "lm", "untrained"),
    [
        ("none", "next_token", ["itm_head"]),
        ("global", "none", []),
        ("none", "none", ["itm_head", "cross_attention"]),
    ],
)
def test_a_network_without_itm_or_lm(
    tmp_path: Path, all_losses: dict[str, float], itm: str, lm: str, untrained: list[str]
) -> None:
    """Untrained modules keep their initial weights, and the decoder is absent without LM.

    The losses that remain, with their weights, are those of a run with all losses in the first
    step. Another choice of losses at a resume is refused, and the checkpoint converts.
    """
    changes = {"itm": itm, "lm": lm}
    file = recipe_of_losses(tmp_path, **changes, itc_weight=0.5)
    assert tiny_runs.finish(tiny_runs.launch(file, 1)) == [0], tiny_runs.said(file)
    run = tmp_path / "run"
    measured = tiny_runs.losses(run)[1]
    names = {"itc", *(["itm"] if itm != "none" else []), *(["lm"] if lm != "none" else [])}
    assert set(measured) == {"loss/total", *(f"loss/{name}" for name in names)}
    for name in names:
        assert measured[f"loss/{name}"] == pytest.approx(all_losses[f"loss/{name}"], abs=1e-6)
    weighed = 0.5 * measured["loss/itc"] + sum(measured[f"loss/{n}"] for n in names - {"itc"})
    assert measured["loss/total"] == pytest.approx(weighed, abs=1e-5)

    task = task_of(recipes.load(str(file)))
    initial = task.initial_weights()
    weights = tiny_runs.whole_tensors(run / "checkpoints" / "step_00000001", "weight")
    still = [n for n, tensor in weights.items() if torch.equal(tensor, initial[n].flatten())]
    assert {name for name in still if any(part in name for part in untrained)} == set(still)
    assert bool(still) == bool(untrained)
    assert any("decoder" in name for name in weights) == (lm != "none")
    summary = json.loads((run / "summary.json").read_text())
    assert bool(summary["captions"]) == (lm != "none")
    assert any("/itm_" in name for name in summary["evaluation"]) == (itm != "none")
    for name in ("itm", "lm"):
        if changes[name] == "none":
            other = {"itm": "local", "lm": "next_token"}[name]
            assert tiny_runs.finish(tiny_runs.launch(file, 1, f"objective.{name}={other}")) == [2]
            refusal = tiny_runs.said(file).strip().splitlines()[-1]
            assert f"objective.{name}: {other}, but the checkpoint was trained with none" in refusal
    blip = load_blip(run)
    assert (blip.serves("match"), blip.serves("caption")) == (itm != "none", lm != "none")
    if itm == "none":
        with pytest.raises(ValueError, match=r"was trained with objective\.itm: none"):
            blip.require("match")
    assert convert_checkpoint.main([str(run), str(tmp_path / "blip.pth")]) == 0


@pytest.mark.multiprocess
def test_a_run_with_a_contrast_of_its_own_is_converted_and_not_taken_up_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our checkpoints keep the weights of a contrast, which other formats have no place for.

    Formats without a place for them name them. A run can't change to a contrast with momentum, as
    its averages are missing.
    """
    file = recipe_of(tmp_path, "pretrain", "sigmoid")
    codes = tiny_runs.finish(tiny_runs.launch(file, 1, "train.max_steps=1"))
    assert codes == [0], tiny_runs.said(file)
    run = tmp_path / "run"
    weights = tiny_runs.whole_tensors(run / "checkpoints" / "step_00000001", "weight")
    for name, arguments in (("blip.pth", ()), ("hf", ("--head", "all"))):
        capsys.readouterr()
        assert convert_checkpoint.main([str(run), str(tmp_path / name), *arguments]) == 0
        output = capsys.readouterr().out
        assert "note: left out, because the published network lacks it" in output
        assert "contrast.bias.value" in output
    assert convert_checkpoint.main([str(run), str(tmp_path / "ours"), "--to", "ours"]) == 0
    kept = load_file(tmp_path / "ours" / "rank_00000.safetensors")
    assert torch.equal(kept["weight/contrast.bias.value"], weights["contrast.bias.value"])

    arguments = ("objective.itc=momentum", "objective.queue_size=40")
    assert tiny_runs.finish(tiny_runs.launch(file, 1, *arguments)) == [2]
    refusal = tiny_runs.said(file).strip().splitlines()[-1]
    assert "objective.itc: momentum, but the checkpoint was trained with sigmoid" in refusal


_ADDED = ("format_version", "checksum")
"""Fields of manifest.json that `Manifest.to_json` adds."""


@pytest.mark.multiprocess
def test_a_run_without_averages_is_not_taken_up_with_momentum(tmp_path: Path) -> None:
    """A checkpoint of a contrast without weights lacks only the momentum averages."""
    file = recipe_of(tmp_path, "pretrain", "momentum")
    room = "objective.queue_size=40"
    assert tiny_runs.finish(tiny_runs.launch(file, 1, "train.max_steps=1", room)) == [0]
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    rank = step / "rank_00000.safetensors"
    with safe_open(rank, "pt") as opened:
        starts = opened.metadata()
    kept = {key: t for key, t in load_file(rank).items() if not key.startswith("momentum/")}
    save_file(kept, rank, starts)
    manifest = json.loads((step / "manifest.json").read_text())
    digest = xxhash.xxh3_64(rank.read_bytes()).hexdigest()
    manifest["files"][rank.name] = {"bytes": rank.stat().st_size, "xxh3": digest}
    content = {name: manifest[name] for name in manifest if name not in _ADDED}
    (step / "manifest.json").write_text(Manifest(**content).to_json())
    assert tiny_runs.finish(tiny_runs.launch(file, 1, room)) == [2]
    refusal = tiny_runs.said(file)
    assert "holds no momentum averages of med." in refusal and "Traceback" not in refusal


@pytest.mark.multiprocess
def test_an_unknown_contrast_is_refused_with_the_names_of_all(tmp_path: Path) -> None:
    file = recipe_of(tmp_path, "pretrain", "in_bach")
    assert tiny_runs.finish(tiny_runs.launch(file, 1)) == [2]
    refusal = tiny_runs.said(file)
    assert "'in_bach' is not a contrastive loss; give momentum or in_batch or sigmoid" in refusal
