"""Test image encoders in whole runs on two ranks: partitioned, resumed, evaluated and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch

from blip_scale.commands import convert_checkpoint
from blip_scale.config import recipe
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.inputs import to_pixels
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.inference.sizes import med_config
from blip_scale.interop.checkpoints import load_checkpoint
from blip_scale.model.med import MED

pytestmark = pytest.mark.multiprocess

IN_CI = ("vit_base_patch16_siglip_224", "vit_small_patch16_dinov3", "beitv2_base_patch16_224")
OTHERS = (
    "deit_base_distilled_patch16_224",
    "vit_base_patch16_siglip_224.v2_webli",
    "vit_base_patch16_clip_224.openai",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_plus_patch16_dinov3_qkvb",
    "vit_pe_core_base_patch16_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "aimv2_large_patch14_224",
    "vit_small_patch16_rope_mixed_224",
)


def run(folder: Path, name: str) -> tuple[dict[int, dict[str, float]], dict[str, torch.Tensor]]:
    """Train or resume to step 3, and return the losses and the final weights."""
    tower = {"vision": {"name": name}}
    file = tiny_runs.make_recipe(folder, model=tower, checkpoint={"every_steps": 2})
    tiny_runs.train(file, 2, "train.max_steps=3", "train.whole_weights=false")
    last = folder / "run" / "checkpoints" / "step_00000003"
    return tiny_runs.losses(folder / "run"), tiny_runs.whole_tensors(last, "weight")


@pytest.mark.parametrize(
    "name", [*IN_CI, *(pytest.param(name, marks=pytest.mark.towers) for name in OTHERS)]
)
def test_a_tower_trains_resumes_and_is_exported(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that resumes at step 2 gives bitwise equal results.

    The loaded model gives the outputs of the trained one. Export to Hugging Face is refused, with
    the reason and the fix. The other formats keep the weights bitwise.
    """
    losses, weights = run(tmp_path, name)
    source = tmp_path / "run"
    shutil.rmtree(source / "checkpoints" / "step_00000003")
    losses_again, weights_again = run(tmp_path, name)
    assert "resuming at step 2" in tiny_runs.said(tmp_path / "recipe.yaml")
    assert losses == losses_again and losses[3] != losses[2]
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(weights[key], weights_again[key]) for key in weights)
    assert "heldout/itc_image_to_text_r1" in (source / "metrics.jsonl").read_text()

    chosen = recipe.load(str(tmp_path / "recipe.yaml"))
    med = MED(med_config(chosen, load_tokenizer(chosen.model.text))).eval()
    load_checkpoint(med, source)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = med.encode_image(to_pixels(images, med))
    large = load_blip(source, Loading(device="cpu", image_size=48))
    assert large.image_embeds(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)).isfinite().all()

    assert convert_checkpoint.main([str(source), str(tmp_path / "hf")]) == 2
    refusal = capsys.readouterr().err
    assert "can't become a Hugging Face" in refusal and "--to ours" in refusal
    for out, *target in (("run",), ("copy", "--to", "ours"), ("copy.pth",)):
        if out != "run":
            assert convert_checkpoint.main([str(source), str(tmp_path / out), *target]) == 0
        tokenizer = str(tmp_path / "vocabulary")
        loaded = load_blip(tmp_path / out, Loading(device="cpu", tokenizer=tokenizer))
        assert torch.equal(loaded.image_embeds(images), expected), out
