"""Dropout on a CPU against its definition."""

from __future__ import annotations

import pytest
import torch

from blip_scale.model.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_one_by_one_and_the_others_scaled(
    p: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    y.sum().backward()
    assert torch.equal(y, x.grad)  # type: ignore[arg-type]
    zero, scale = y.unique().tolist()
    assert zero == 0 and scale == pytest.approx(
        1 / (1 - p), rel=1e-4 if x.dtype.itemsize == 4 else 4e-3
    )
    kept = (y != 0).double()
    error = 5 * (p * (1 - p) / kept.numel()) ** 0.5
    assert kept.mean().item() == pytest.approx(1 - p, abs=error)
    for shift in (1, 2, 3, 4, 999):  # four elements share one draw, but are independent
        ahead, behind = kept.flatten()[shift:], kept.flatten()[:-shift]
        covariance = (ahead * behind).mean() - kept.mean() ** 2
        assert covariance.item() == pytest.approx(0, abs=3 * error)


def test_the_seed_decides_and_draws_differ() -> None:
    x = torch.ones(7, 33)
    torch.manual_seed(3)
    first, second = dropout(x, 0.3), dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3), first)
    assert not torch.equal(first, second)


def test_nothing_is_dropped_with_p_0_or_in_evaluation() -> None:
    x = torch.ones(5, 3)
    state = torch.random.get_rng_state()
    assert torch.equal(dropout(x, 0.0), x)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(Dropout(0.5)(x), x)
    assert dropout(torch.ones(0, 3), 0.5).shape == (0, 3)
