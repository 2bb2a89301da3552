"""Networks, initial weights and model input from a recipe."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms import Normalize

from blip_scale.config.recipe import Recipe
from blip_scale.data.pixels.transforms import normalize_images
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.sizes import med_config
from blip_scale.model.heads import Head
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED
from blip_scale.tasks import networks


def test_pixels_are_normalised_as_published() -> None:
    """Pixels are normalised by CLIP's mean and deviation, like torchvision's, then cast to bf16."""
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    expected = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))(
        images.float() / 255
    )
    torch.testing.assert_close(normalize_images(images, torch.float32), expected)
    normalised = normalize_images(images, torch.bfloat16)
    assert normalised.dtype == torch.bfloat16
    torch.testing.assert_close(normalised, expected.bfloat16(), rtol=0.01, atol=0.01)


@pytest.fixture
def bert(recipe: Recipe, tmp_path: Path) -> Path:
    """A folder with a tokenizer and the config.json of a BERT, which tests may change."""
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
    with pytest.raises(ValueError, match=f"{bert}: {named}.*give such a checkpoint"):
        med_config(with_checkpoint(recipe, bert, None), load_tokenizer(recipe.model.text))


def test_a_checkpoint_without_its_sizes_is_refused(bert: Path, recipe: Recipe) -> None:
    """The folder is called bert, which is enough for transformers to make sizes up."""
    (bert / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"model.text.checkpoint {bert}: there is no conf"):
        med_config(with_checkpoint(recipe, bert, None), load_tokenizer(recipe.model.text))


def test_more_layers_than_the_checkpoint_has_are_refused(bert: Path, recipe: Recipe) -> None:
    """They would silently stay random."""
    from transformers import BertConfig, BertModel

    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(bert)
    asked = with_checkpoint(recipe, bert, 6)
    tokenizer = load_tokenizer(asked.model.text)
    with pytest.raises(ValueError, match=r"it has 5 layers, 6 are asked for"):
        networks.initialized_med(asked, med_config(asked, tokenizer))


WITHOUT = {
    "pretrain": r"$^",
    "captioning": r"(text\.layers\.\d+\.self_attention_encoder|vision_proj|text_proj|itm_head"
    r"|temperature)\.",
    "retrieval": r"(text\.layers\.\d+\.self_attention_decoder|lm_head)\.",
}
"""Parameters of MED that a head does without, written out."""


@pytest.mark.parametrize("head", WITHOUT)
def test_initial_weights_of_a_part_are_those_of_the_whole(recipe: Recipe, head: Head) -> None:
    config = med_config(recipe, load_tokenizer(recipe.model.text))
    med = MED(config)
    init_weights(med, recipe.seed, recipe.model.vision.init_std, recipe.model.text.init_std)
    expected = {
        f"med.{name}": parameter
        for name, parameter in med.named_parameters()
        if not re.match(WITHOUT[head], name)
    }
    initial = networks.initial_parameters(recipe, config, head)
    assert initial.keys() == expected.keys()
    assert all(torch.equal(initial[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("head", "random"),
    [("vqa", []), ("visdial", []), ("nlvr2", ["cls_head", "merge_layer"])],
)
def test_initial_weights_of_other_networks_are_meds(
    recipe: Recipe, head: Head, random: list[str]
) -> None:
    """Encoder and decoder have what MED shares; NLVR2 has its one cross-attention twice. What MED
    lacks is drawn anew from the same seed."""
    config = med_config(recipe, load_tokenizer(recipe.model.text))
    med = dict(networks.initialized_med(recipe, config).named_parameters())
    initial = networks.initial_parameters(recipe, config, head)
    again = networks.initial_parameters(recipe, config, head)
    drawn = set()
    for name, tensor in initial.items():
        bare = re.sub(r"text_(encoder|decoder)\.", "text.", name.removeprefix("med."))
        bare = re.sub(r"\.images\.[01]", "", bare)
        if bare in med:
            assert torch.equal(tensor, med[bare]), name
        else:
            drawn.add(name)
        assert torch.equal(tensor, again[name]), name
    assert {kind for kind in random if any(kind in name for name in drawn)} == set(random)
    assert all(any(kind in name for kind in random) for name in drawn)
    if drawn:
        fixed = {"med.cls_head.0.weight"}
        with pytest.raises(ValueError, match=r"cls_head\.0.* would stay at random"):
            networks.initial_parameters(recipe, config, head, fixed)
    networks.initial_parameters(recipe, config, head, initial.keys() - drawn)
