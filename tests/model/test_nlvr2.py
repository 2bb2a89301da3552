"""The NLVR2 network against a plain one that takes one pair at a time.

The plain one follows the formulas of the paper and of the published code.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_med import ENC, MakeMED, tiny_config
from torch import Tensor, nn

from blip_scale.interop.heads import expected_shapes
from blip_scale.interop.task_names import task_from_published, task_to_published
from blip_scale.model.initialization import fill_from_med, name_in_med
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.packing import PackedText


@pytest.fixture
def network() -> NLVR2:
    """An NLVR2 of three layers: the first averages both images, the other two merge them."""
    network = NLVR2(tiny_config())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def plain(state: dict[str, Tensor], network: NLVR2, embeds: list[Tensor], ids: list[int]) -> Tensor:
    """Logits [2] of one sentence about two images, whose tokens are [N, image width] each.

    `state` holds the weights under their published names.
    """
    text = network.config.text

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, (text.width,), state[f"{name}.weight"], state[f"{name}.bias"], text.norm_eps
        )

    def attend(x: Tensor, seen: Tensor, name: str) -> Tensor:
        channels = text.width // text.heads
        q = linear(x, f"{name}.query").view(len(x), text.heads, channels)
        k = linear(seen, f"{name}.key").view(len(seen), text.heads, channels)
        v = linear(seen, f"{name}.value").view(len(seen), text.heads, channels)
        weights = torch.einsum("ihc,jhc->hij", q, k).div(math.sqrt(channels)).softmax(-1)
        return torch.einsum("hij,jhc->ihc", weights, v).reshape(len(x), text.width)

    bert = "text_encoder.embeddings"
    x = state[f"{bert}.word_embeddings.weight"][ids]
    x = norm(x + state[f"{bert}.position_embeddings.weight"][: len(ids)], f"{bert}.LayerNorm")
    for number in range(text.layers):
        layer = f"text_encoder.encoder.layer.{number}"
        context = attend(x, x, f"{layer}.attention.self")
        context = linear(context, f"{layer}.attention.output.dense")
        x = norm(context + x, f"{layer}.attention.output.LayerNorm")
        cross = f"{layer}.crossattention"
        both = []
        for i in range(2):
            context = attend(x, embeds[i], f"{cross}.self{i}")
            both.append(linear(context, f"{cross}.output.dense{i}"))
        if number < text.layers // 2:
            merged = (both[0] + both[1]) / 2
        else:
            merged = linear(torch.cat(both, -1), f"{cross}.output.merge_layer")
        x = norm(merged + x, f"{cross}.output.LayerNorm")
        hidden = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(linear(hidden, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
    return linear(F.relu(linear(x[0], "cls_head.0")), "cls_head.2")


@torch.no_grad()
def test_logits(network: NLVR2, images: Tensor, sentences: list[list[int]]) -> None:
    pairs = torch.cat([images, images.flip(0)])
    text = PackedText.from_lists(sentences).with_first_token(ENC)
    state = task_to_published(dict(network.named_parameters()))
    embeds = network.vision(pairs)
    expected = [
        plain(state, network, [embeds[i], embeds[i + len(images)]], [ENC, *sentences[i][1:]])
        for i in range(len(images))
    ]
    torch.testing.assert_close(network(pairs, text), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_names_are_the_whole_published_layout(network: NLVR2) -> None:
    parameters = dict(network.named_parameters())
    state = task_to_published(parameters)
    wanted = expected_shapes("nlvr2", network.config, None)
    assert {name: tensor.shape for name, tensor in state.items()} == wanted
    back = task_from_published(state, parameters)
    assert all(torch.equal(back[name], parameters[name]) for name in parameters)


def test_start_from_pretraining(make_med: MakeMED) -> None:
    """Both cross-attentions are MED's. Only merge layers and classifier are random."""
    med, network = make_med(), NLVR2(tiny_config())
    drawn = fill_from_med(network, dict(med.named_parameters()), seed=3)
    assert {name.split(".")[-2] for name in drawn} == {"merge_layer", "0", "2"}
    there = dict(med.named_parameters())
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter).all()
        if name not in drawn:
            assert torch.equal(parameter, there[name_in_med(name)])
    again = NLVR2(tiny_config())
    fill_from_med(again, dict(med.named_parameters()), seed=3)
    assert all(map(torch.equal, network.parameters(), again.parameters()))
    merge = next(name for name in drawn if name.endswith("merge_layer.weight"))
    assert network.get_parameter(merge).std().item() == pytest.approx(0.02, rel=0.1)
    fill_from_med(again, dict(med.named_parameters()), seed=3, text_std=0.1)
    assert again.get_parameter(merge).std().item() == pytest.approx(0.1, rel=0.1)


def test_a_few_pairs_are_learnt(images: Tensor, sentences: list[list[int]]) -> None:
    """A sentence that is true of a pair is false of the pair with another second image."""
    torch.manual_seed(0)
    network = NLVR2(tiny_config())
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    pairs = torch.cat([images, images, images, images.roll(1, 0)])
    text = PackedText.from_lists([*sentences, *sentences]).with_first_token(ENC)
    labels = torch.arange(len(images)) % 2
    labels = torch.cat([labels, 1 - labels])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(pairs, text), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
