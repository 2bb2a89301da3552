"""Heat maps of words: the explicit attention against the model's layer, the maps against Grad-CAM
of transformers' network, and that a map follows its patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip_scale.inference.blip import Blip
from blip_scale.inference.images import pixels_of
from blip_scale.inference.loading import load_blip
from blip_scale.inference.word_maps import (
    WordMaps,
    explained_layer,
    explicit_cross_attention,
    word_maps,
)
from blip_scale.model.packing import ImageIndex, PackedText, plan_pass

CAPTIONS = ["a big red disc", "a small green cross on a white square", "black bar"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def blip(ours: Path) -> Blip:
    return load_blip(ours)


@pytest.fixture(scope="module")
def pixels(pictures: Path) -> Tensor:
    """uint8 [3, 3, 32, 32], one image a caption."""
    paths = sorted(pictures.glob("*.png"))[: len(CAPTIONS)]
    return torch.stack([pixels_of(path.read_bytes(), 32) for path in paths])


@pytest.fixture(scope="module")
def maps(blip: Blip, pixels: Tensor) -> list[WordMaps]:
    return word_maps(blip, blip.image_embeds(pixels), CAPTIONS)


@torch.no_grad()
def test_the_explicit_attention_is_that_of_the_layer(blip: Blip, pixels: Tensor) -> None:
    """Captions of several lengths, so that the padded layout has pads."""
    embeds = blip.image_embeds(pixels).clone()
    text = PackedText.from_lists(blip.tokenized(CAPTIONS)["input_ids"])
    images = ImageIndex(len(embeds), embeds.shape[1], encoder=torch.arange(len(embeds)))
    plan = plan_pass(text, None, images, takes_packed=False)
    hidden = torch.randn(len(text.token_ids), 48, generator=torch.Generator().manual_seed(0))
    for layer in blip.med.text.layers:
        expected = layer.cross_attention(hidden, embeds, plan.cross)
        output, attention = explicit_cross_attention(
            layer.cross_attention, hidden, embeds, text.segments
        )
        torch.testing.assert_close(output, expected, **CLOSE)
        assert attention.shape == (3, 4, text.segments.max_length, embeds.shape[1])
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_the_probability_is_that_of_match(blip: Blip, pixels: Tensor, maps: list[WordMaps]) -> None:
    expected = blip.match(blip.image_embeds(pixels), CAPTIONS, range(len(CAPTIONS)))
    probabilities = torch.tensor([result.probability for result in maps])
    torch.testing.assert_close(probabilities, expected, **CLOSE)


def test_maps_are_grad_cam_of_transformers(
    hf: Path, pixels: Tensor, maps: list[WordMaps], blip: Blip
) -> None:
    """Its eager attention gives the probabilities of the same layer, and autograd the rest."""
    from transformers import BlipForImageTextRetrieval

    other = BlipForImageTextRetrieval.from_pretrained(
        hf / "retrieval", attn_implementation="eager"
    ).eval()
    number = explained_layer(len(blip.med.text.layers))
    attention = other.text_encoder.encoder.layer[number - 1].crossattention
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        output[1].retain_grad()
        kept.append(output[1])

    attention.self.register_forward_hook(keep)
    images = blip.image_embeds(pixels).clone()
    for index, caption in enumerate(CAPTIONS):
        ids = torch.tensor(blip.tokenized([caption])["input_ids"])
        ids[:, 0] = other.config.text_config.enc_token_id
        states = other.text_encoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=images[index : index + 1],
            output_attentions=True,
        ).last_hidden_state
        other.itm_head(states[:, 0])[:, 1].sum().backward()
        probabilities = kept.pop()
        assert probabilities.grad is not None
        cam = (probabilities * probabilities.grad.clamp(min=0)).mean(1)[0].detach()
        words = caption.split()
        assert maps[index].words == words
        expected = cam[1 : len(words) + 1, 1:].unflatten(-1, (4, 4))
        assert expected.max() > 1e-4
        torch.testing.assert_close(maps[index].maps, expected, atol=1e-6, rtol=1e-4)


def test_patches_that_move_move_the_map(blip: Blip, pixels: Tensor) -> None:
    """Without position embeddings the ViT knows no places, so a map goes where its patch goes."""
    size, grid = 8, 4
    order = torch.randperm(grid * grid, generator=torch.Generator().manual_seed(3))
    patches = pixels[:1].unfold(2, size, size).unfold(3, size, size).flatten(2, 3)
    moved = patches[:, :, order].unflatten(2, (grid, grid)).permute(0, 1, 2, 4, 3, 5)
    moved = moved.reshape(1, 3, grid * size, grid * size)
    position = blip.network.vision.pos_embed
    kept = position.clone()
    try:
        position.zero_()
        (before,) = word_maps(blip, blip.image_embeds(pixels[:1]), CAPTIONS[:1])
        (after,) = word_maps(blip, blip.image_embeds(moved), CAPTIONS[:1])
    finally:
        position.copy_(kept)
    expected = before.maps.flatten(1)[:, order].unflatten(1, (grid, grid))
    torch.testing.assert_close(after.maps, expected, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(after.maps, before.maps, rtol=0.1)


def test_maps_depend_on_image_and_word(blip: Blip, pixels: Tensor, maps: list[WordMaps]) -> None:
    """Other images and other words have other maps; other images in the batch change nothing."""
    (other,) = word_maps(blip, blip.image_embeds(pixels[1:2]), CAPTIONS[:1])
    assert not torch.allclose(other.maps, maps[0].maps, rtol=0.1)
    assert not torch.allclose(maps[0].maps[1], maps[0].maps[3], rtol=0.1)
    (alone,) = word_maps(blip, blip.image_embeds(pixels[:1]), CAPTIONS[:1])
    torch.testing.assert_close(alone.maps, maps[0].maps, atol=1e-6, rtol=1e-4)


def test_a_word_of_several_tokens_has_one_map(blip: Blip, pixels: Tensor) -> None:
    """And punctuation has none."""
    embeds = blip.image_embeds(pixels[:1])
    (result,) = word_maps(blip, embeds, ["a big, red disc?"])
    assert result.words == ["a", "big", "red", "disc"]
    assert result.maps.shape == (4, 4, 4) and result.maps.min() >= 0
    torch.testing.assert_close(result.mean, result.maps.mean(0))
    for text in ("", " . ", "?"):
        with pytest.raises(ValueError, match="holds no word; give one with words"):
            word_maps(blip, embeds, [text])


def test_the_layer_is_eight_of_twelve() -> None:
    assert [explained_layer(count) for count in (12, 24, 6, 3, 2)] == [8, 16, 4, 2, 1]
    with pytest.raises(ValueError, match="has a single layer"):
        explained_layer(1)


def test_a_checkpoint_that_cannot_match_is_refused(hf: Path, pixels: Tensor) -> None:
    captioner = load_blip(hf / "captioning")
    with pytest.raises(ValueError, match="is a captioning checkpoint; match takes one of"):
        word_maps(captioner, captioner.image_embeds(pixels[:1]), CAPTIONS[:1])
