"""Compiled blocks: one graph per kind, no graph breaks, and no new graph once sizes are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_med import CLS, DEC, ENC, SEP, tiny_config
from torch import Tensor, nn

from blip_scale.model import kernels
from blip_scale.model.attention import Segments
from blip_scale.model.compiling import compile_blocks
from blip_scale.model.initialization import init_weights
from blip_scale.model.kernels import choose_kernel
from blip_scale.model.med import MED, MomentumEncoder
from blip_scale.model.packing import PackedText, Room

PAIRS, MAX_TOKENS = 4, 9
KINDS = 9
"""Number of graphs of a step. ViT blocks have three: with gradient, without, and for the class
token alone. Text layers have six: the last layer and the others, each in ITC with gradient, in ITC
without, and in the sweep."""


class Graphs:
    """Backend of torch.compile that counts graphs and runs them uncompiled."""

    def __init__(self) -> None:
        self.count = self.flash = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.count += 1
        self.flash += sum("flash" in str(node.target) for node in graph.graph.nodes)
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


class Step(nn.Module):
    """The forward of a pretraining step, without its losses."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        config = tiny_config(**changes)
        self.med, self.momentum = MED(config), MomentumEncoder(config)
        init_weights(self.med, seed=1)

    def forward(self, images: Tensor, text: PackedText, room: Room | None) -> Tensor:
        med, every = self.med, torch.arange(PAIRS, device=images.device)
        embeds = med.encode_image(images)
        with torch.no_grad():
            self.momentum.encode_image(images)
            self.momentum.encode_text(text)
        pairs = text.select(torch.cat([every, every, every.roll(1)]), room)
        itm, lm, _ = med.sweep(
            pairs.with_first_token(ENC),
            text.with_first_token(DEC),
            embeds,
            torch.cat([every, every.roll(1), every]),
            every,
        )
        return itm.sum() + lm.sum() + med.encode_text(text).sum()


def batches(count: int, sizes: list[Room | None]) -> Iterator[tuple[Tensor, PackedText, Any]]:
    """Random images and captions. Captions are filled up to each of the rooms in turn, if any."""
    rng = random.Random(0)

    def caption() -> list[int]:
        words = rng.randint(1, MAX_TOKENS - 2)
        return [CLS, *(rng.randrange(5, 60) for _ in range(words)), SEP]

    for number in range(count):
        rows = [caption() for _ in range(PAIRS)]
        text, room = PackedText.from_lists(rows), sizes[number % len(sizes)]
        drawn = None
        if room is not None:
            text = PackedText(text.token_ids, Segments(text.segments.offsets, MAX_TOKENS))
            text = text.select(torch.arange(PAIRS), room)
            drawn = Room(3 * room.tokens, 3 * room.fillers)
        yield torch.randn(PAIRS, 3, 32, 32), text, drawn


STATIC = [Room.between(3 * PAIRS, MAX_TOKENS * PAIRS, MAX_TOKENS)]
EVERY_BUCKET = [*STATIC, Room(STATIC[0].tokens + 8, STATIC[0].fillers + 1)]


@pytest.mark.parametrize(
    ("sizes", "known_after", "most", "checkpointing"),
    [
        (STATIC, 1, KINDS, False),
        (EVERY_BUCKET, 2, 2 * KINDS, True),
        ([None], 5, 3 * KINDS, False),
    ],
    ids=["one-bucket", "two-buckets", "unpadded"],
)
def test_no_graph_more_once_sizes_are_known(
    graphs: Graphs, sizes: list[Room | None], known_after: int, most: int, checkpointing: bool
) -> None:
    """Losses and gradients equal those of the plain network. A graph break would raise."""
    step = Step(gradient_checkpointing=checkpointing)
    plain = Step()
    plain.load_state_dict(step.state_dict())
    compile_blocks(step, backend=graphs)
    known_graphs = 0
    for number, (images, text, room) in enumerate(batches(50, sizes)):
        loss, expected = step(images, text, room), plain(images, text, room)
        torch.testing.assert_close(loss, expected)
        if number < 3:
            loss.backward()
            expected.backward()
        if number == known_after:
            known_graphs = graphs.count
    assert graphs.count == known_graphs <= most
    if sizes is STATIC and not checkpointing:
        assert known_graphs == KINDS
    for name, parameter in step.named_parameters():
        expected_grad = plain.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected_grad, atol=1e-5, rtol=1e-4, msg=name)


def test_dropout_patch_dropout_and_frozen_layers_compile(graphs: Graphs) -> None:
    config = tiny_config(dropout=0.1)
    vision = replace(config.vision, patch_dropout=0.5, frozen_layers=1)
    step = Step(dropout=0.1)
    step.med = MED(replace(config, vision=vision))
    init_weights(step.med, seed=1)
    compile_blocks(step, backend=graphs)
    for images, text, room in batches(6, STATIC):
        step(images, text, room).backward()
    # Two more: the frozen block, and the first block that trains, whose input has no gradient.
    assert graphs.count == KINDS + 2


def test_the_packed_kernel_does_not_break_graphs(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs on meta tensors, whose device stands for a GPU."""
    monkeypatch.setattr(kernels, "_unfit", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    choose_kernel.cache_clear()
    step = Step(dropout=0.1, width=32).to("meta", torch.bfloat16)
    compile_blocks(step, backend=graphs)
    for images, text, room in batches(4, STATIC):
        step(images.to("meta", torch.bfloat16), text.to("meta"), room).backward()
    choose_kernel.cache_clear()
    assert graphs.count == KINDS and graphs.flash >= KINDS
