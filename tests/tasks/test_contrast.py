"""A second contrastive loss in the real engine: one class and one dict entry serve pretraining and
retrieval."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_runs
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_with_another_contrast import BIAS, InBatch

from blip_scale.commands import convert_checkpoint
from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe
from blip_scale.engine.schedule import learning_rate
from blip_scale.inference.inputs import to_model_input
from blip_scale.storage.checkpoint_format import Manifest
from blip_scale.tasks.by_name import TASKS
from blip_scale.tasks.contrastive_task import CONTRASTS, ContrastiveTask

SCRIPT = Path(__file__).with_name("train_with_another_contrast.py")


def recipe_of(folder: Path, task: str, contrast: str) -> Path:
    """Recipe without dropout, and with a queue that is too small for the global batch."""
    return tiny_runs.make_recipe(
        folder,
        task=task,
        model={"text": {"dropout": 0.0}},
        objective={"itc": contrast, "queue_size": 4},
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
    return torch.stack(terms).mean()


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["pretrain", "retrieval"])
def test_a_contrast_without_momentum_encoders_and_queue_trains(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss of the first step and the bias after it against the formula; nothing of momentum in
    network, checkpoint and log."""
    file = recipe_of(tmp_path, name, "in_batch")
    codes = tiny_runs.finish(tiny_runs.launch(file, 1, script=SCRIPT))
    assert codes == [0], tiny_runs.said(file)

    monkeypatch.setitem(CONTRASTS, "in_batch", InBatch)
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
    assert set(manifest["task"]) == {"loader"}
    with safe_open(checkpoints / "step_00000002" / "shared.safetensors", "pt") as shared:
        assert not list(shared.keys())
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"itc/in_batch_i2t"' in logged
    for figure in ("queue/", "momentum/", "train/alpha"):
        assert figure not in logged


@pytest.mark.multiprocess
def test_the_ranks_share_a_contrasts_own_weights(tmp_path: Path) -> None:
    """A resumed run with negatives of all ranks has the bias of its checkpoint."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
        file = recipe_of(folder, "pretrain", "in_batch")
        for steps in (2,) if folder is whole else (1, 2):
            arguments = (f"train.max_steps={steps}", "objective.negatives=global")
            codes = tiny_runs.finish(tiny_runs.launch(file, 2, *arguments, script=SCRIPT))
            assert codes == [0, 0], tiny_runs.said(file)
    for kind in ("weight", "exp_avg"):
        ends = [
            tiny_runs.whole_tensors(folder / "run" / "checkpoints" / "step_00000002", kind)
            for folder in (whole, halves)
        ]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
        assert "contrast.bias.value" in ends[0]


@pytest.mark.multiprocess
def test_a_run_with_a_contrast_of_its_own_is_converted_and_not_taken_up_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our checkpoints keep the weights of a contrast that the convert command doesn't know.

    Formats without a place for them name them. A run can't change to a contrast with momentum, as
    its averages are missing.
    """
    file = recipe_of(tmp_path, "pretrain", "in_batch")
    codes = tiny_runs.finish(tiny_runs.launch(file, 1, "train.max_steps=1", script=SCRIPT))
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
    assert "1 elements of contrast.bias.value, the recipe's network 0" in refusal


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
    assert tiny_runs.finish(tiny_runs.launch(file, 1, script=SCRIPT)) == [2]
    refusal = tiny_runs.said(file)
    assert "objective.itc: 'in_bach' is no contrast; give momentum or in_batch" in refusal
