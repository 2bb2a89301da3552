"""`model.vision.frozen_layers` in whole runs: frozen weights stay and are in every checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch
from torch import Tensor

from blip_scale.config import recipe
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.sizes import med_config
from blip_scale.interop.checkpoints import read_checkpoint
from blip_scale.tasks import networks

pytestmark = pytest.mark.multiprocess

KINDS = ("weight", "exp_avg", "exp_avg_sq", "momentum")
FROZEN = ("med.vision.blocks.0.", "med.vision.patch_embed.", "med.vision.pos_embed",
          "med.vision.cls_token")  # fmt: skip


def make_recipe(folder: Path, precision: str = "fp32") -> Path:
    return tiny_runs.make_recipe(
        folder,
        model={"vision": {"frozen_layers": 1, "patch_dropout": 0.5}},
        train={"precision": precision},
        checkpoint={"every_steps": 3},
    )


def tensors(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    return {kind: tiny_runs.whole_tensors(checkpoint, kind) for kind in KINDS}


@pytest.mark.parametrize(
    ("stage", "ranks", "precision"), [(3, 2, "fp32"), (3, 1, "bf16"), (2, 2, "bf16")]
)
def test_frozen_weights_stay_and_a_resumed_run_has_the_same_bits(
    tmp_path: Path, stage: int, ranks: int, precision: str
) -> None:
    """Frozen weights keep their fp32 initial values, also in bf16. All others move."""
    file = make_recipe(tmp_path, precision)
    chosen = recipe.load(str(file))
    tokenizer = load_tokenizer(chosen.model.text)
    med = networks.initialized_med(chosen, med_config(chosen, tokenizer))
    last, ends = tmp_path / "run" / "checkpoints" / "step_00000006", []
    for _ in range(2):  # the second time from step 3
        shutil.rmtree(last, ignore_errors=True)
        tiny_runs.train(file, ranks, stage=stage)
        ends.append((tiny_runs.losses(tmp_path / "run"), tensors(last)))
    assert "resuming at step 3" in tiny_runs.said(file)
    (losses, first), (losses_again, again) = ends
    assert losses == losses_again
    for kind in KINDS:
        assert first[kind].keys() == again[kind].keys()
        for name, tensor in first[kind].items():
            assert torch.equal(tensor, again[kind][name]), f"{kind} {name}"
            assert kind == "weight" or not name.startswith(FROZEN)
    for name, parameter in med.named_parameters():
        weight = first["weight"][f"med.{name}"]
        stays = torch.equal(weight, parameter.detach().flatten())
        assert stays == f"med.{name}".startswith(FROZEN), name

    network = med_config(chosen, tokenizer)
    state = read_checkpoint(last, network).state
    for part in ("pos_embed", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"):
        same = torch.equal(state[f"visual_encoder.{part}"], state[f"visual_encoder_m.{part}"])
        assert same == (not part.startswith("blocks.1")), part


def test_another_number_of_ranks_and_other_frozen_layers(tmp_path: Path) -> None:
    """Other ranks resume with the same weights. Other frozen layers are refused, with the fix."""
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
