"""A recipe that starts from a checkpoint: what it leaves out comes from there, what it gives and
contradicts is refused by the setting's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_blip
import yaml

from blip_scale.commands import convert_checkpoint, plan
from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe
from blip_scale.inference.starting_sizes import with_sizes_of_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    return tiny_blip.make_run(place / "run", tiny_blip.vocabulary(place / "vocabulary"))


def loaded(file: Path, checkpoint: Path, *overrides: str, **model: object) -> Recipe:
    """What training makes of a recipe."""
    file.write_text(yaml.safe_dump({"model": {"checkpoint": str(checkpoint), **model}}))
    recipe = recipes.load(str(file), overrides)
    return with_sizes_of_checkpoint(recipe, recipes.stated(str(file), overrides))


def test_sizes_and_tokenizer_come_from_every_kind(run: Path, tmp_path: Path) -> None:
    words = str(run.parent / "vocabulary")
    places = {"hf": ("--head", "all"), "whole.pth": (), "ours": ("--to", "ours")}
    for name, arguments in places.items():
        assert convert_checkpoint.main([str(run), str(tmp_path / name), *arguments]) == 0
    expected = recipes.load(str(run / "recipe.yaml")).model
    for place in (run, tmp_path / "hf", tmp_path / "ours", tmp_path / "whole.pth"):
        arguments = [f"model.text.tokenizer={words}"] if place.suffix else []
        model = loaded(tmp_path / "r.yaml", place, *arguments).model
        if place.name != "hf":  # whose config knows no names of timm's
            assert model.vision == expected.vision
        sizes = {name: model.vision.overrides[name] for name in tiny_blip.SIZES}
        assert sizes == tiny_blip.SIZES and model.vision.image_size == 32
        assert model.embed_dim == expected.embed_dim == 16
        text = model.text
        assert (text.checkpoint, text.layers, text.width) == (None, 2, 48)
        assert (text.heads, text.mlp_width) == (4, 96)
        assert text.tokenizer and (place != run or text.tokenizer == words)
        assert text.prompt == "" and text.max_tokens == 30  # of training, not of the network


def test_what_is_given_stays(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    vision = {"image_size": 64, "drop_path_rate": 0.1}
    model = loaded(file, run, vision=vision, text={"layers": 2, "dropout": 0.0}).model
    assert (model.vision.image_size, model.vision.drop_path_rate) == (64, 0.1)
    assert model.vision.overrides == tiny_blip.SIZES and model.text.dropout == 0.0
    without = Recipe()
    assert with_sizes_of_checkpoint(without, set()) is without


def test_another_network_is_refused_by_its_settings(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    with pytest.raises(ValueError, match=r"model\.text\.layers gives text layers 3, .* has 2\. "):
        loaded(file, run, "model.text.layers=3")
    with pytest.raises(ValueError, match=r"model\.embed_dim gives embed_dim 32, .* has 16"):
        loaded(file, run, embed_dim=32)
    depth = dict(tiny_blip.SIZES, depth=3)
    both = r"overrides\.depth gives vision blocks 3, .* has 2; model\.text\.width gives .* 96"
    with pytest.raises(ValueError, match=both):
        loaded(file, run, vision={"overrides": depth}, text={"width": 96})
    other = tiny_blip.vocabulary(tmp_path / "other")
    with (other / "vocab.txt").open("a") as lines:
        lines.write("more\nwords\n")
    (other / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"text\.tokenizer gives vocabulary 27, .* has 25"):
        loaded(file, run, text={"tokenizer": str(other)})


def test_the_plan_counts_the_network_of_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"model": {"checkpoint": str(run)}}))
    memory = []
    for recipe in (file, run / "recipe.yaml"):
        assert plan.main([str(recipe), "--json", "train.max_steps=10"]) == 0
        memory.append(json.loads(capsys.readouterr().out)["memory_terms_gib"])
    assert 0 < memory[0]["weights"] == memory[1]["weights"]
