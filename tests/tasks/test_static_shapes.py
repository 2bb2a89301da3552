"""Captions filled up to static sizes: equal losses and gradients, equal shapes in every step of a
bucket, no waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import FakeRanks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from blip_scale.config.batch_sizes import token_bucket
from blip_scale.config.model_recipe import TextRecipe
from blip_scale.config.recipe import DataRecipe, ObjectiveRecipe, Recipe
from blip_scale.data.loading.micro_batches import Batch
from blip_scale.data.tokenizer import load_tokenizer, pack_captions, special_ids
from blip_scale.inference.inputs import packed_text
from blip_scale.model import kernels
from blip_scale.model.flops import padded_pretraining_flops, pretraining_flops
from blip_scale.model.heads import cut_down
from blip_scale.model.initialization import init_weights
from blip_scale.model.kernels import choose_kernel
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.model.packing import PackedText, Room
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig
from blip_scale.objectives.contrastive import FeaturePair
from blip_scale.tasks import hard_pairs
from blip_scale.tasks.contrastive_task import ContrastiveNetwork
from blip_scale.tasks.hard_pairs import TextSizes, text_sizes
from blip_scale.tasks.momentum_contrast import MomentumContrastNetwork, MomentumInputs
from blip_scale.tasks.pretrain import PretrainNetwork
from blip_scale.tasks.retrieval import RetrievalNetwork

PAIRS, BUCKET, MAX_TOKENS, QUEUE, EMBED = 6, 16, 9, 8, 12
WORDS = ("red", "blue", "disc", "bar", "on", "grey", "small")
FIRST = [1, 5, 3, 2, 6, 4]
"""Words of each caption."""
SECOND = [4, 4, 1, 7, 3, 4]
"""Others, whose tokens fall into the same bucket."""

Kind = Callable[[MED, torch.nn.Module, ObjectiveRecipe], ContrastiveNetwork]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vocabulary")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return _load(folder)


def _load(folder: Path) -> Any:
    from transformers import BertTokenizerFast

    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return load_tokenizer(TextRecipe(checkpoint=None, tokenizer=str(folder)))


def batch_of(
    tokenizer: Any, lengths: list[int], bucket: int, max_tokens: int = MAX_TOKENS
) -> Batch:
    """A batch of captions with these numbers of words, without pictures."""
    captions = [" ".join(WORDS[(n + i) % len(WORDS)] for i in range(n)) for n in lengths]
    packed = pack_captions(tokenizer, captions, max_tokens, bucket)
    names = [str(number) for number in range(len(captions))]
    return Batch(
        images=torch.empty(0),
        token_ids=packed.token_ids,
        offsets=packed.offsets,
        max_length=packed.max_length,
        ids=names,
        captions=captions,
        sources=names,
        streams=names,
        skipped=[],
        padding=packed.padding,
    )


def network_of(tokenizer: Any, kind: Kind, negatives: str = "local") -> ContrastiveNetwork:
    """A network of two layers per tower without dropout, with weights far from their initial
    values."""
    special = SpecialTokens(**special_ids(tokenizer))
    text = TextConfig(
        special, len(tokenizer), width=32, layers=2, heads=4, mlp_width=64, max_positions=16,
        dropout=0.0,
    )  # fmt: skip
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
    config = MEDConfig(VisionConfig("vit_tiny_patch16_224", 32, sizes), text, EMBED)
    med, momentum = MED(config), MomentumEncoder(config)
    init_weights(med, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for _, copy, online in momentum.pairs(med):
            copy.copy_(online)
    if kind is RetrievalNetwork:
        cut_down(med, "retrieval")
    settings = ObjectiveRecipe(itm=negatives)
    return kind(med, MomentumContrastNetwork(momentum), settings)


def arguments(batch: Batch, sizes: TextSizes | None, seed: int = 3) -> tuple[Any, ...]:
    """All arguments of a network on the CPU. Two of the pairs have the same image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(PAIRS, 3, 32, 32, generator=generator)
    queue = torch.nn.functional.normalize(torch.randn(2, EMBED, QUEUE, generator=generator), dim=1)
    ids = torch.arange(PAIRS) // 2 + seed * 100
    alpha = torch.tensor([0.4, 0.6], dtype=torch.float64)
    inputs = MomentumInputs(FeaturePair(queue[0], queue[1]), alpha, torch.arange(QUEUE))
    text = packed_text(batch, torch.device("cpu"))
    return images, text, inputs, torch.Generator().manual_seed(seed + 5), ids, sizes


def step(network: ContrastiveNetwork, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Outputs and gradients of a micro-step."""
    network.zero_grad()
    outputs = network(*inputs)
    outputs["loss/total"].backward()
    named = network.named_parameters()
    return outputs | {n: p.grad for n, p in named if p.grad is not None}


def compare(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    outputs.pop("retry")
    assert outputs.keys() == expected.keys() and len(expected) > 40
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, atol=2e-6, rtol=2e-5, msg=name)


KINDS = pytest.mark.parametrize("kind", [PretrainNetwork, RetrievalNetwork])


@KINDS
@pytest.mark.parametrize("full", [False, True])
def test_filling_up_changes_no_loss_and_no_gradient(tokenizer: Any, kind: Kind, full: bool) -> None:
    network = network_of(tokenizer, kind)
    expected = step(network, arguments(batch_of(tokenizer, FIRST, 1), None))
    batch = batch_of(tokenizer, FIRST, BUCKET)
    sizes = text_sizes(batch, MAX_TOKENS, full)
    assert batch.padding.fillers > 0 and sizes.room is not None and sizes.room.fillers > 0
    outputs = step(network, arguments(batch, sizes))
    assert outputs["retry"] == 0.0
    compare(outputs, expected)


@KINDS
def test_a_draw_that_does_not_fit_asks_for_a_repetition(
    tokenizer: Any, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image draws the longest caption, which overflows the usual room and fits into the full
    one."""
    draw = hard_pairs.HardNegatives

    def drawn(*_: Any, **__: Any) -> Any:
        return draw(torch.arange(PAIRS).roll(1), torch.full((PAIRS,), longest))

    for module in ("pretrain", "retrieval"):
        monkeypatch.setattr(f"blip_scale.tasks.{module}.draw_negatives", drawn)
    lengths = [1, 1, 1, 1, 1, 7]
    longest = lengths.index(7)
    network = network_of(tokenizer, kind)
    batch = batch_of(tokenizer, lengths, 8)
    batch = replace(batch, padding=replace(batch.padding, spread=8))
    tight = step(network, arguments(batch, text_sizes(batch, MAX_TOKENS, False)))
    assert tight["retry"] == 1.0 and tight["loss/total"].isfinite()
    full = step(network, arguments(batch, text_sizes(batch, MAX_TOKENS, True)))
    assert full["retry"] == 0.0
    compare(full, step(network, arguments(batch_of(tokenizer, lengths, 1), None)))


@KINDS
def test_filling_up_changes_nothing_for_global_negatives(
    tokenizer: Any, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks have different captions."""
    lengths = (FIRST, SECOND)
    network = network_of(tokenizer, kind, "global")

    def outputs(rank: int, bucket: int) -> dict[str, Tensor]:
        batch = batch_of(tokenizer, lengths[rank], bucket)
        sizes = text_sizes(batch, MAX_TOKENS, full_capacity=False)
        with torch.no_grad():
            return network(*arguments(batch, sizes, seed=rank))

    ranks = FakeRanks(2, monkeypatch)
    plain = ranks.run(lambda rank: outputs(rank, 1))
    filled = ranks.run(lambda rank: outputs(rank, BUCKET))
    for outputs_of_rank, expected in zip(filled, plain, strict=True):
        assert outputs_of_rank.pop("retry") == 0.0
        for name, value in expected.items():
            torch.testing.assert_close(outputs_of_rank[name], value, atol=2e-6, rtol=2e-5, msg=name)
    assert not torch.equal(plain[0]["loss/itm"], plain[1]["loss/itm"])


class Recorder(TorchDispatchMode):
    """Every operation with the shapes of its results. Tensors of the device "meta" have no values,
    so an operation that needs one raises here, as it makes the host wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("generator", None)  # which "meta" does not take
        out = func(*args, **kwargs)
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        sources = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
        devices = {t.device.type for t in (*tensors, *sources)}
        name = func.overloadpacket.__name__
        assert name not in ("nonzero", "masked_select", "unique", "_unique2"), name
        if devices == {"cpu", "meta"} and any(t.device.type == "cpu" and t.dim() for t in sources):
            raise AssertionError(f"{name} copies from the host")
        self.calls.append((name, [tuple(t.shape) for t in tensors]))
        return out


@pytest.fixture(params=["sdpa", "torch_flash"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels of a GPU in fp32 and in bf16. The device "meta" stands for the GPU."""
    if request.param == "torch_flash":
        monkeypatch.setattr(kernels, "_unfit", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    choose_kernel.cache_clear()
    yield request.param
    choose_kernel.cache_clear()


def on_a_device_without_values(value: Any) -> Any:
    """Arguments of a network moved to "meta"."""
    if isinstance(value, Tensor | PackedText):
        return value.to("meta")
    if isinstance(value, FeaturePair):
        return FeaturePair(value.image.to("meta"), value.text.to("meta"))
    if isinstance(value, MomentumInputs):
        moved = {name: on_a_device_without_values(part) for name, part in vars(value).items()}
        return MomentumInputs(**moved)
    return value


@KINDS
@pytest.mark.parametrize("negatives", ["local", "global"])
def test_no_shape_depends_on_the_data(
    tokenizer: Any, kind: Kind, negatives: str, kernel: str
) -> None:
    """Forward and backward on tensors without values: two batches of one bucket run the same
    operations on the same shapes."""
    dtype = torch.bfloat16 if kernel == "torch_flash" else torch.float32
    network = network_of(tokenizer, kind, negatives).to("meta", dtype)
    calls = []
    for lengths in (FIRST, FIRST, SECOND):
        batch = batch_of(tokenizer, lengths, BUCKET)
        moved = [
            on_a_device_without_values(value)
            for value in arguments(batch, text_sizes(batch, MAX_TOKENS, full_capacity=False))
        ]
        moved[0] = moved[0].to(dtype)
        network.zero_grad()
        with Recorder() as recorder:
            network(*moved)["loss/total"].backward()
        calls.append(recorder.calls)
    _, first, second = calls  # the first one of all fills caches
    flash = [name for name, _ in first if "flash" in name]
    assert bool(flash) == (kernel == "torch_flash")
    assert len(first) > 500 and first == second


PUBLISHED = MEDConfig(
    VisionConfig(), TextConfig(SpecialTokens(pad=0, cls=101, sep=102, enc=30523, dec=30522))
)
"""ViT-B/16 at 224 pixels and BERT-base."""


def published_sizes(tokenizer: Any, pairs: int) -> tuple[Batch, Room]:
    """Captions of 12.5 tokens on average with a deviation of 4.4, filled up as on a GPU."""
    recipe = Recipe(output_dir="runs/x", data=DataRecipe())
    bucket = token_bucket(recipe, pairs, on_gpu=True)
    generator = torch.Generator().manual_seed(pairs)
    words = (torch.randn(pairs, generator=generator) * 4.4 + 10.5).round().clamp(1, 28)
    batch = batch_of(tokenizer, [int(count) for count in words], bucket, max_tokens=30)
    room = text_sizes(batch, 30, full_capacity=False).room
    assert room is not None
    return batch, room


@pytest.mark.parametrize(("pairs", "bucket"), [(64, 64), (90, 128), (256, 256)])
def test_filling_up_costs_little(tokenizer: Any, pairs: int, bucket: int) -> None:
    """Extra FLOPs by formula, compared with the 194 GFLOP of a pair without fillers."""
    batch, room = published_sizes(tokenizer, pairs)
    assert batch.padding.bucket == bucket and len(batch.token_ids) % bucket == 0
    text = packed_text(batch, torch.device("cpu"))
    plain = pretraining_flops(PUBLISHED, pairs, batch.caption_tokens, 57600)
    assert plain / pairs == pytest.approx(194e9, rel=0.03)
    padded = padded_pretraining_flops(PUBLISHED, text, room, 57600)
    assert 1.005 < padded / plain < 1.05


def test_paper_and_counter_agree_on_padded_steps(tokenizer: Any) -> None:
    """At the published size; SDPA's chunks of image groups, which no packed kernel needs, make the
    counted products larger."""
    batch, room = published_sizes(tokenizer, 90)
    with torch.device("meta"):
        med, momentum = MED(PUBLISHED), MomentumEncoder(PUBLISHED)
    network = PretrainNetwork(med, MomentumContrastNetwork(momentum), ObjectiveRecipe())
    text = packed_text(batch, torch.device("meta"))
    images = torch.empty(90, 3, 224, 224, device="meta")
    queue = torch.empty(256, 57600, device="meta")
    alpha = arguments(batch, None)[2].alpha
    inputs = on_a_device_without_values(MomentumInputs(FeaturePair(queue, queue), alpha))
    with Recorder(), FlopCounterMode(display=False) as counter:
        outputs = network(images, text, inputs, None, None, TextSizes(30, room))
        outputs["loss/total"].backward()
    paper = padded_pretraining_flops(PUBLISHED, text, room, 57600)
    assert paper == pytest.approx(counter.get_total_flops(), rel=0.02)
