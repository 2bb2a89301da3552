"""Frozen layers and LoRA in whole runs: every checkpoint contains the unchanged frozen weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor

from blip_scale.commands import convert_checkpoint
from blip_scale.config import recipe
from blip_scale.config.recipe import Recipe
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.inference.sizes import limited, med_config
from blip_scale.interop.blip_weights import BlipWeights
from blip_scale.interop.checkpoints import read_checkpoint
from blip_scale.interop.salesforce import to_salesforce
from blip_scale.interop.training_checkpoints import write_training_checkpoint
from blip_scale.model import adapters
from blip_scale.model.med import MED
from blip_scale.model.packing import PackedText
from blip_scale.tasks import networks

pytestmark = pytest.mark.multiprocess

KINDS = ("weight", "exp_avg", "exp_avg_sq", "momentum")
FROZEN = ("med.vision.blocks.0.", "med.vision.patch_embed.", "med.vision.pos_embed",
          "med.vision.cls_token")  # fmt: skip


LORA = {"rank": 3, "alpha": 12}


def make_recipe(folder: Path, precision: str = "fp32", **model: Any) -> Path:
    return tiny_runs.make_recipe(
        folder,
        model={"vision": {"frozen_layers": 1, "patch_dropout": 0.5}, **model},
        train={"precision": precision},
        checkpoint={"every_steps": 3},
    )


def lora_recipe(folder: Path) -> Path:
    """Write the recipe of a LoRA run that starts from a checkpoint with random weights."""
    chosen = recipe.load(str(make_recipe(folder)))
    config = med_config(chosen, load_tokenizer(chosen.model.text))
    med = networks.initialized_med(chosen, config)
    start = folder / "start" / "step_00000001"
    state = to_salesforce(dict(med.named_parameters()), "pretrain")
    start.mkdir(parents=True)
    write_training_checkpoint(BlipWeights("pretrain", config, state, "random"), start)
    return make_recipe(folder, checkpoint=str(start), lora=LORA)


def partitioned(folder: Path) -> str:
    """Write DeepSpeed settings that partition all weights except the smallest."""
    settings = json.loads((tiny_runs.REPO / "ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    file = folder / "partitioned.json"
    file.write_text(json.dumps(settings))
    return str(file)


def tensors(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    return {kind: tiny_runs.whole_tensors(checkpoint, kind) for kind in KINDS}


@pytest.mark.parametrize(
    ("stage", "ranks", "precision", "lora"),
    [(3, 2, "fp32", True), (3, 1, "bf16", False), (2, 2, "bf16", False)],
)
def test_frozen_weights_stay_and_a_resumed_run_has_the_same_bits(
    tmp_path: Path, stage: int, ranks: int, precision: str, lora: bool
) -> None:
    """Frozen weights keep their initial fp32 values, also in a bf16 run. All other weights change.

    With LoRA, the weights are partitioned, and only adapters and heads change.
    """
    file = lora_recipe(tmp_path) if lora else make_recipe(tmp_path, precision)
    arguments = ("--deepspeed", partitioned(tmp_path)) if lora else ()
    chosen = recipe.load(str(file))
    tokenizer = load_tokenizer(chosen.model.text)
    med = networks.initialized_med(chosen, med_config(chosen, tokenizer))
    last, ends = tmp_path / "run" / "checkpoints" / "step_00000006", []
    for _ in range(2):  # the second run resumes from step 3
        shutil.rmtree(last, ignore_errors=True)
        tiny_runs.train(file, ranks, *arguments, stage=stage)
        ends.append((tiny_runs.losses(tmp_path / "run"), tensors(last)))
    assert "resuming at step 3" in tiny_runs.said(file)
    (losses, first), (losses_again, again) = ends
    assert losses == losses_again
    trained = first["exp_avg"].keys()
    for kind in KINDS:
        assert first[kind].keys() == again[kind].keys()
        for name, tensor in first[kind].items():
            assert torch.equal(tensor, again[kind][name]), f"{kind} {name}"
            assert kind == "weight" or name in trained
    initial = {f"med.{name}": p.detach().flatten() for name, p in med.named_parameters()}
    for name, values in adapters.renamed(initial, first["weight"]).items():
        is_frozen = name.startswith(FROZEN)
        if lora:
            is_frozen = adapters.part_of(name.removeprefix("med.")) is not None
        assert (name not in trained) == is_frozen, name
        assert torch.equal(first["weight"][name], values) == is_frozen, name

    network = med_config(chosen, tokenizer)
    state = read_checkpoint(last, network).state
    for part in ("pos_embed", "blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight"):
        same = torch.equal(state[f"visual_encoder.{part}"], state[f"visual_encoder_m.{part}"])
        assert same == (not part.startswith("blocks.1")), part
    if lora:
        assert "parameters train: adapters" in tiny_runs.said(file)
        check_merged(tmp_path, chosen, first["weight"])


def check_merged(folder: Path, chosen: Recipe, weights: dict[str, Tensor]) -> None:
    """Check that a loaded and an exported checkpoint give the outputs of the adapted network."""
    blip = load_blip(folder / "run", Loading(device="cpu"))
    med = limited(MED(blip.med.config), chosen.model).eval()
    with torch.no_grad():
        for name, parameter in med.named_parameters():
            parameter.copy_(weights[f"med.{name}"].view_as(parameter))
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        text = PackedText.from_lists([[2, 5, 6, 3], [2, 7, 3]])
        outputs = []
        for network in (med, blip.med):
            embeds = network.encode_image(pixels)
            states = network.encode_text(text)
            outputs.append([embeds, states, network.match(text, embeds, torch.arange(2))])
            outputs[-1].append(network.decode(text, embeds, torch.arange(2)))
    for value, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    file = folder / "merged.pth"
    assert convert_checkpoint.main([str(folder / "run"), str(file)]) == 0
    exported = read_checkpoint(file, blip.med.config).state
    merged = read_checkpoint(folder / "run", blip.med.config).state
    assert not [name for name in merged if not torch.equal(merged[name], exported[name])]


def test_another_number_of_ranks_and_other_frozen_layers(tmp_path: Path) -> None:
    """A run with a different number of ranks resumes with the same weights.

    Different frozen layers are refused, and the message names the fix.
    """
    file = make_recipe(tmp_path)
    tiny_runs.train(file, 2, "train.max_steps=3")
    checkpoints = tmp_path / "run" / "checkpoints"
    tiny_runs.train(file, 1, "train.max_steps=4")
    before, after = (tensors(checkpoints / f"step_{step:08d}")["weight"] for step in (3, 4))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == name.startswith(FROZEN), name
    codes = tiny_runs.finish(tiny_runs.launch(file, 1, "model.vision.frozen_layers=2"))
    output = tiny_runs.said(file)
    assert codes == [2] and "give the model.vision.frozen_layers that it was made with" in output

    begun = ("model.vision.frozen_layers=0", f"model.checkpoint={checkpoints.parent}")
    tiny_runs.train(file, 1, *begun, f"output_dir={tmp_path}/thawed", "train.max_steps=1")
    thawed = tensors(tmp_path / "thawed" / "checkpoints" / "step_00000001")
    assert thawed["weight"].keys() == thawed["exp_avg"].keys() == before.keys()
