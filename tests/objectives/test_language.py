"""LM loss against the formula of label smoothing, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from blip_scale.objectives.language import lm_loss

P, V = 7, 13


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_loss_is_the_formula(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(P, V) * 2, torch.randint(0, V, (P,))
    expected = 0.0
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        log_total = math.log(sum(math.exp(value) for value in row))
        costs = [log_total - value for value in row]
        expected += (1 - smoothing) * costs[target] + smoothing * sum(costs) / V
    assert lm_loss(logits, targets, smoothing).item() == pytest.approx(expected / P, abs=1e-5)


def test_uniform_prediction_costs_the_log_of_the_vocabulary() -> None:
    loss = lm_loss(torch.zeros(3, 30_524), torch.tensor([0, 5, 30_523]))
    assert loss.item() == pytest.approx(math.log(30_524), abs=1e-4)


def test_softmax_is_taken_in_fp32() -> None:
    logits = (torch.randn(P, V) * 3).bfloat16()
    targets = torch.randint(0, V, (P,))
    loss = lm_loss(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, lm_loss(logits.double(), targets))
