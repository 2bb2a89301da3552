"""The momentum update against its formula, and against an update in bf16, which never moves."""

from __future__ import annotations

import pytest
import torch

from blip_scale.objectives.momentum import momentum_update_


def test_update_is_the_formula_on_any_shapes_and_in_place() -> None:
    shapes = [(), (3,), (2, 4), (0,)]
    averages = [torch.randn(shape) for shape in shapes]
    weights = [torch.randn(shape) for shape in shapes]
    kept = [weight.clone() for weight in weights]
    expected = []
    for average, weight in zip(averages, weights, strict=True):
        expected.append(0.995 * average.double() + 0.005 * weight.double())
    addresses = [average.data_ptr() for average in averages]
    momentum_update_(averages, weights, 0.995)
    for average, want in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.double(), want, atol=1e-7, rtol=1e-6)
    assert addresses == [average.data_ptr() for average in averages]
    assert all(torch.equal(weight, before) for weight, before in zip(weights, kept, strict=True))


def test_fp32_arrives_where_bf16_never_leaves() -> None:
    average, weight = torch.ones(4), torch.full((4,), 1.05)
    naive = torch.ones(4, dtype=torch.bfloat16)
    naive_lerp = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(2_000):
        momentum_update_([average], [weight], 0.995)
        naive = naive * 0.995 + weight.bfloat16() * 0.005
        naive_lerp.lerp_(weight.bfloat16(), 0.005)
    assert torch.equal(naive, torch.ones_like(naive))
    assert torch.equal(naive_lerp, torch.ones_like(naive_lerp))
    torch.testing.assert_close(average, weight, atol=1e-4, rtol=0)


def test_a_shard_is_updated_as_the_whole_is() -> None:
    average, weight = torch.randn(10), torch.randn(10)
    whole = [average.clone()]
    momentum_update_(whole, [weight], 0.9)
    for start in (0, 4, 8):
        momentum_update_([average[start : start + 4]], [weight[start : start + 4]], 0.9)
    assert torch.equal(average, whole[0])


def test_other_types_are_refused() -> None:
    good, bad = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"average 1 is torch\.bfloat16"):
        momentum_update_([good, bad], [good, good], 0.9)
    with pytest.raises(ValueError, match=r"weight 0 is torch\.bfloat16"):
        momentum_update_([good], [bad], 0.9)


def test_nothing_to_update_is_fine() -> None:
    momentum_update_([], [], 0.995)
