"""What networks and their input are made from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms import Normalize

from blip_scale.config.recipe import Recipe
from blip_scale.data.pixels.transforms import normalize_images
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.sizes import med_config
from blip_scale.tasks import networks


def test_pixels_are_normalised_as_published() -> None:
    """CLIP's mean and deviation, as torchvision would do it; to bf16 after, not before."""
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    expected = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))(
        images.float() / 255
    )
    torch.testing.assert_close(normalize_images(images, torch.float32), expected)
    found = normalize_images(images, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0.01, atol=0.01)


@pytest.fixture
def bert(recipe: Recipe, tmp_path: Path) -> Path:
    """A folder with tokenizer and the config.json of a BERT, to be changed by the tests."""
    from transformers import BertConfig

    folder = tmp_path / "bert"
    load_tokenizer(recipe.model.text).save_pretrained(folder)
    BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=5, num_attention_heads=2,
        intermediate_size=36, max_position_embeddings=70, layer_norm_eps=1e-7,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def change(folder: Path, **settings: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def with_checkpoint(recipe: Recipe, folder: Path, layers: int | None) -> Recipe:
    text = replace(recipe.model.text, checkpoint=str(folder), layers=layers, width=999)
    return replace(recipe, model=replace(recipe.model, text=text))


@pytest.mark.parametrize(("layers", "expected"), [(None, 5), (2, 2)])
def test_sizes_are_those_of_the_checkpoint(
    bert: Path, recipe: Recipe, layers: int | None, expected: int
) -> None:
    tokenizer = load_tokenizer(recipe.model.text)
    text = med_config(with_checkpoint(recipe, bert, layers), tokenizer).text
    assert (text.width, text.heads, text.mlp_width, text.max_positions) == (24, 2, 36, 70)
    assert (text.norm_eps, text.layers) == (1e-7, expected)
    assert text.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_act": "relu"}, "activation relu with absolute positions"),
        (
            {"position_embedding_type": "relative_key"},
            "activation gelu with relative_key positions",
        ),
    ],
)
def test_a_stack_of_another_kind_is_refused(
    bert: Path, recipe: Recipe, settings: dict[str, str], named: str
) -> None:
    change(bert, **settings)
    with pytest.raises(ValueError, match=f"{bert}: {named}.*take one of that kind"):
        med_config(with_checkpoint(recipe, bert, None), load_tokenizer(recipe.model.text))


def test_a_checkpoint_without_its_sizes_is_refused(bert: Path, recipe: Recipe) -> None:
    """The folder is called bert, which is enough for transformers to make sizes up."""
    (bert / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"model.text.checkpoint {bert}: there is no conf"):
        med_config(with_checkpoint(recipe, bert, None), load_tokenizer(recipe.model.text))


def test_more_layers_than_the_checkpoint_has_are_refused(bert: Path, recipe: Recipe) -> None:
    """They would stay random without a word."""
    from transformers import BertConfig, BertModel

    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(bert)
    asked = with_checkpoint(recipe, bert, 6)
    tokenizer = load_tokenizer(asked.model.text)
    with pytest.raises(ValueError, match=r"it has 5 layers, 6 are asked for"):
        networks.initialized_med(asked, med_config(asked, tokenizer))
