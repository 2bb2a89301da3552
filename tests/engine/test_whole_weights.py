"""Test ZeRO-3 with whole weights: their communication, when they are chosen, and equal results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import nn

from blip_scale.config import checks, recipe
from blip_scale.config.weight_placement import (
    Sizes,
    asks_for_partitioning,
    fits,
    obstacle,
    whole_bytes,
)
from blip_scale.engine import collectives
from blip_scale.engine.zero import deepspeed_patches
from blip_scale.engine.zero.gradient_buckets import GradientBuckets, bucket_ranges
from blip_scale.engine.zero.whole_weights import FlatWeights
from blip_scale.planning.network import network_of
from blip_scale.tasks.by_name import contrast_of

MOST_REDUCTIONS = 12
OWN_SIZES = ("model.vision.checkpoint=null", "data.streams=[]", "data.heldout=[]")


def test_buckets_hold_all_parameters_last_ones_first() -> None:
    numels = [5, 3, 9, 1, 1, 20, 2]
    ranges = bucket_ranges(numels, limit=10)
    assert ranges == [range(6, 7), range(5, 6), range(3, 5), range(2, 3), range(0, 2)]
    assert [index for bucket in reversed(ranges) for index in bucket] == [*range(7)]
    assert bucket_ranges([], limit=10) == []


@pytest.mark.parametrize("name", ["base_129M", "large_129M"])
def test_few_reductions_at_full_size(name: str) -> None:
    """The bucket size is that of ds_configs/zero3.json."""
    network = network_of(recipe.load(name, OWN_SIZES), contrast_of)
    ranges = bucket_ranges(network.trainable, limit=50_000_000)
    assert sum(network.trainable) > 200e6
    assert 2 < len(ranges) <= MOST_REDUCTIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overlapping", [True, False])
def test_micro_batches_are_summed_in_fp32(dtype: torch.dtype, overlapping: bool) -> None:
    """Gradients of three micro-steps on one rank are summed in fp32.

    A parameter without a gradient counts as zero, even if the previous step left a value.
    """
    shapes = ((2, 3), (), (4,), (5, 2))
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
    sizes = [parameter.numel() for parameter in parameters]
    sums = torch.full((sum(sizes),), 5.0)
    buckets = GradientBuckets(
        parameters, sizes, sums, limit=6, accumulation=3, exchange_dtype=dtype
    )
    assert [[*bucket.indices] for bucket in buckets.buckets] == [[3], [1, 2], [0]]
    expected = torch.zeros_like(sums)
    for _ in range(3):
        factors = [torch.randn(shape, dtype=dtype) for shape in shapes]
        used = zip(factors[:3], parameters[:3], strict=True)  # the last one gets no gradient
        loss = torch.stack([(factor * p).float().sum() for factor, p in used]).sum()
        if overlapping:
            buckets.backward(loss, is_last=True)
        else:
            buckets.add(buckets.compute(loss), is_last=True)
        assert all(parameter.grad is None for parameter in parameters)
        third = [(factor.float() / 3).to(dtype).float().flatten() for factor in factors[:3]]
        expected += torch.cat([*third, torch.zeros(10)])
    is_rounded = dtype == torch.bfloat16  # each third is rounded; the order of operations varies
    torch.testing.assert_close(
        sums, expected, rtol=1e-2 if is_rounded else 1e-5, atol=1e-2 if is_rounded else 1e-6
    )
    assert not sums[-10:].any()


def test_parts_of_three_ranks_make_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights have 1, 2 and 15 elements. Their parts are padded to equal sizes."""
    weights = [torch.randn(shape) for shape in ((), (2,), (3, 5))]
    parts = [nn.functional.pad(w.flatten(), (0, -w.numel() % 3)).view(3, -1) for w in weights]
    parameters = [nn.Parameter(torch.empty(0)) for _ in weights]
    for parameter, weight, part in zip(parameters, weights, parts, strict=True):
        parameter.ds_tensor = part[1].clone()  # type: ignore[attr-defined]
        parameter.ds_tensor.ds_numel = part[1].numel()  # type: ignore[attr-defined]
        parameter.ds_numel, parameter.ds_shape = weight.numel(), weight.shape  # type: ignore[attr-defined]
    sent: list[torch.Tensor] = []

    def all_gather(part: torch.Tensor) -> torch.Tensor:
        sent.append(part)
        return torch.cat(parts, dim=1)

    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    monkeypatch.setattr(collectives, "all_gather", all_gather)
    flat = FlatWeights(parameters)
    flat.gather()
    assert len(sent) == 1 and torch.equal(sent[0], torch.cat(parts, dim=1)[1:2])
    for index, (parameter, weight) in enumerate(zip(parameters, weights, strict=True)):
        assert torch.equal(parameter, weight) and parameter.is_contiguous()
        assert torch.equal(flat.part(index), parts[index][1])


def test_whole_weights_are_chosen_by_memory() -> None:
    """The sizes are those of ViT-B in bf16: 223M trainable parameters, 165M momentum copies."""
    alone = Sizes(223_000_000, 165_000_000, ranks=1, accumulation=1, compute_bytes=2)
    many = Sizes(223_000_000, 165_000_000, ranks=64, accumulation=4, compute_bytes=2)
    gib = 2**30
    assert 5 * gib < whole_bytes(alone) < 6 * gib
    assert whole_bytes(many) < whole_bytes(alone)
    assert fits(alone, 16 * gib) and not fits(alone, 10 * gib)


def test_settings_that_whole_weights_contradict_are_named() -> None:
    assert obstacle({"stage": 3, "offload_optimizer": {"device": "none"}}) is None
    assert obstacle({"offload_optimizer": {"device": "cpu"}}) == "offload_optimizer"
    assert obstacle({"zero_quantized_weights": True}) == "zero_quantized_weights"
    assert obstacle({"zero_hpz_partition_size": 8}) == "zero_hpz_partition_size"
    assert asks_for_partitioning({"stage3_param_persistence_threshold": 100})
    assert not asks_for_partitioning({"stage3_param_persistence_threshold": "auto"})


def test_replaced_names_are_there() -> None:
    """The installed DeepSpeed has every private name that the patches replace."""
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import (
        parameter_offload,
        partition_parameters,
        stage3,
    )

    sources = [
        Path(module.__file__).read_text()
        for module in (engine, parameter_offload, partition_parameters, stage3)
        if module.__file__
    ]
    assert deepspeed_patches.are_checked()
    for name in deepspeed_patches.REPLACED:
        last = name.rpartition(".")[2]
        assert any(last in source for source in sources), name


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_split_backward_passes_give_the_same_bits(tmp_path: Path, ranks: int) -> None:
    """Two micro-steps give equal results with overlapped reductions and with a split backward."""
    changes: dict[str, Any] = {"train": {"micro_batch_size": 8 // ranks, "max_steps": 4}}
    results = []
    for name, script in (
        ("overlapping", tiny_runs.TRAIN),
        ("split", Path(__file__).with_name("train_by_split_backward.py")),
    ):
        (tmp_path / name).mkdir()
        file = tiny_runs.make_recipe(tmp_path / name, **changes)
        assert tiny_runs.finish(tiny_runs.launch(file, ranks, script=script)) == [0] * ranks
        checkpoint = tmp_path / name / "run" / "checkpoints" / "step_00000004"
        weights = tiny_runs.whole_tensors(checkpoint, "weight")
        results.append((tiny_runs.losses(tmp_path / name / "run"), weights))
    (losses, weights), (losses_split, weights_split) = results
    assert losses == losses_split
    assert all(torch.equal(weights[name], weights_split[name]) for name in weights)


@pytest.mark.multiprocess
def test_another_deepspeed_goes_its_own_way(tmp_path: Path) -> None:
    """With another DeepSpeed version, no patch is applied, and the log says so in one line.

    The losses do not change.
    """
    losses_of_runs = []
    for name, script in (
        ("checked", tiny_runs.TRAIN),
        ("another", Path(__file__).with_name("train_on_another_deepspeed.py")),
    ):
        (tmp_path / name).mkdir()
        file = tiny_runs.make_recipe(tmp_path / name, train={"max_steps": 4})
        assert tiny_runs.finish(tiny_runs.launch(file, 2, script=script)) == [0, 0]
        losses_of_runs.append(tiny_runs.losses(tmp_path / name / "run"))
        text = tiny_runs.said(file)
        assert ("weights are whole" in text) == (name == "checked")
        assert ("not for 0.19.999, so they are not applied" in text) == (name == "another")
    for step, losses in losses_of_runs[0].items():
        assert losses_of_runs[1][step] == pytest.approx(losses, abs=2e-5), step


def test_whole_weights_beside_offload_are_refused() -> None:
    chosen = recipe.load("demo", ["train.whole_weights=true"])
    with pytest.raises(ValueError, match=r"true, but .*offload.json sets offload_optimizer"):
        checks.resolve_deepspeed(chosen, checks.shipped_deepspeed("zero3_offload"), 2)
    chosen = recipe.load("demo", ["train.whole_weights=false", "model.compile=true"])
    with pytest.raises(ValueError, match=r"model.compile: .* partitioned weights"):
        checks.resolve_deepspeed(chosen, checks.shipped_deepspeed("zero3"), 2)
