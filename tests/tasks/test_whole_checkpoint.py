"""`model.checkpoint`: a run that starts from any checkpoint of a whole BLIP."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_blip
import tiny_runs
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from blip_scale.commands import convert_checkpoint
from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.sizes import med_config
from blip_scale.interop.vision import interpolate_positions
from blip_scale.model.med import MED
from blip_scale.model.packing import PackedText
from blip_scale.tasks import networks


@pytest.fixture(scope="module")
def sizes(recipe: Recipe):
    return med_config(recipe, load_tokenizer(recipe.model.text))


@pytest.fixture(scope="module")
def checkpoint(recipe: Recipe, sizes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in our format of the recipe's network."""
    folder = tmp_path_factory.mktemp("source") / "step_00000007"
    return tiny_blip.write_ours(folder, sizes, Path(recipe.model.text.tokenizer or ""))


def starting_from(recipe: Recipe, path: Path, image_size: int = 32, **text: int) -> Recipe:
    model = recipe.model
    vision = replace(model.vision, image_size=image_size)
    model = replace(
        model, checkpoint=str(path), vision=vision, text=replace(model.text, **text)
    )  # fmt: skip
    return replace(recipe, model=model)


def started(recipe: Recipe) -> MED:
    config = med_config(recipe, load_tokenizer(recipe.model.text))
    return networks.initialized_med(recipe, config)


def test_any_kind_gives_the_same_start(
    recipe: Recipe, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_file(checkpoint / "rank_00000.safetensors")
    for name, arguments in (("blip.pth", ()), ("hf", ("--head", "all"))):
        assert convert_checkpoint.main([str(checkpoint), str(tmp_path / name), *arguments]) == 0
    caplog.set_level(logging.INFO)
    for path in (checkpoint, tmp_path / "blip.pth", tmp_path / "hf"):
        caplog.clear()
        for name, parameter in started(starting_from(recipe, path)).named_parameters():
            assert torch.equal(parameter.flatten(), expected[f"weight/med.{name}"]), name
        assert f"all weights from {path}" in caplog.text


def test_it_wins_over_other_checkpoints(recipe: Recipe, checkpoint: Path) -> None:
    """The checkpoints of ViT and text, which many recipes name, are not even read."""
    chosen = starting_from(recipe, checkpoint)
    vision = replace(chosen.model.vision, checkpoint="timm")
    med = started(replace(chosen, model=replace(chosen.model, vision=vision)))
    expected = load_file(checkpoint / "rank_00000.safetensors")["weight/med.vision.norm.bias"]
    assert torch.equal(med.vision.norm.bias, expected)


@torch.no_grad()
def test_other_resolutions_are_interpolated(recipe: Recipe, checkpoint: Path) -> None:
    small, large = (started(starting_from(recipe, checkpoint, size)) for size in (32, 64))
    expected = interpolate_positions(small.vision.pos_embed, (8, 8))
    assert torch.equal(large.vision.pos_embed, expected)
    text = PackedText.from_lists([[2, 5, 3]])
    assert torch.equal(large.eval().encode_text(text), small.eval().encode_text(text))


def test_other_networks_are_refused(recipe: Recipe, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another network than the recipe: text layers 2, not 1$"):
        started(starting_from(recipe, checkpoint, layers=1))
    with pytest.raises(ValueError, match=r"text heads 3, not 4$"):  # no shape would tell
        started(starting_from(recipe, checkpoint, heads=4))
    out = tmp_path / "captioner"
    assert convert_checkpoint.main([str(checkpoint), str(out)]) == 0
    with pytest.raises(ValueError, match=r"can't become pretrain: it has no text_encoder and no"):
        started(starting_from(recipe, out))


@pytest.mark.multiprocess
def test_a_run_is_exported_and_goes_on_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks of ZeRO-3 train; what they saved is exported bit for bit, captions a picture, and
    starts another run on one rank, whose momentum copies start equal to it."""
    recipe = tiny_runs.make_recipe(tmp_path / "first", train={"max_steps": 4})
    tiny_runs.train(recipe, 2)
    run = tmp_path / "first" / "run"
    saved = tiny_runs.whole_tensors(run / "checkpoints" / "step_00000004", "weight")
    momentum = tiny_runs.whole_tensors(run / "checkpoints" / "step_00000004", "momentum")

    def convert(source: Path, name: str, *arguments: str) -> Path:
        assert convert_checkpoint.main([str(source), str(tmp_path / name), *arguments]) == 0
        return tmp_path / name

    vocabulary = str(tmp_path / "first" / "vocabulary")
    pth = convert(run, "blip.pth")
    back = load_file(
        convert(pth, "back", "--to", "ours", "--tokenizer", vocabulary) / "rank_00000.safetensors"
    )
    expected: dict[str, Tensor] = {f"weight/{name}": tensor for name, tensor in saved.items()}
    expected |= {f"momentum/{name}": tensor for name, tensor in momentum.items()}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())

    captioner = convert(run, "captioner")
    card = (captioner / "README.md").read_text()
    assert "| data | shapes |" in card and "| steps | 4 |" in card and "## Held-out figures" in card
    from transformers import BlipForConditionalGeneration, BlipProcessor

    picture = Image.open(io.BytesIO(tiny_runs.picture("red", "disc", True)))
    inputs = BlipProcessor.from_pretrained(captioner)(picture, return_tensors="pt")
    written = BlipForConditionalGeneration.from_pretrained(captioner).generate(**inputs)
    assert len(written) == 1 and len(written[0]) > 1

    recipe = tiny_runs.make_recipe(
        tmp_path / "second", model={"checkpoint": str(pth)}, train={"max_steps": 1}
    )
    tiny_runs.train(recipe, 1, stage=2)
    log = (tmp_path / "second" / "run" / "logs" / "rank_0.log").read_text()
    assert f"all weights from {pth}" in log
    folder = tmp_path / "second" / "run" / "checkpoints" / "step_00000001"
    weights, averages = (tiny_runs.whole_tensors(folder, kind) for kind in ("weight", "momentum"))
    share = recipes.load(str(recipe)).objective.momentum
    for name, average in averages.items():  # before the update of the first step
        start = (average - (1 - share) * weights[name]) / share
        torch.testing.assert_close(start, saved[name], rtol=1e-5, atol=1e-6)
