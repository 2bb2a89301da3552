"""Test the detection of loss spikes and slow ranks, in series with and without them."""

from __future__ import annotations

import logging
import math
import random

import pytest

from blip_scale.engine.watching.anomalies import Stragglers, loss_level


def test_a_spike_stands_out_of_noise() -> None:
    dice = random.Random(1)
    usual = [3.0 + dice.gauss(0, 0.1) for _ in range(100)]
    level = loss_level(5.0, usual)
    assert level is not None and level.is_spike
    assert level.ratio == pytest.approx(20, rel=0.3)
    assert (level.low, level.high) == pytest.approx((2.7, 3.3), abs=0.1)
    assert not loss_level(3.3, usual).is_spike
    assert not loss_level(1.0, usual).is_spike  # a lower loss is not a spike
    outliers = usual[:90] + [50.0] * 10  # earlier spikes must not hide a new one
    assert loss_level(5.0, outliers).is_spike


def test_no_spike_in_noise_and_in_a_falling_curve() -> None:
    dice = random.Random(2)
    losses = [6.0 * math.exp(-step / 300) + 3.0 + dice.gauss(0, 0.1) for step in range(2000)]
    for step in range(1, 2000):
        level = loss_level(losses[step], losses[max(0, step - 100) : step])
        assert (level is None) == (step < 20)
        assert level is None or not level.is_spike, step


def test_a_flat_curve_may_ripple() -> None:
    assert not loss_level(1.05, [1.0] * 50).is_spike
    assert loss_level(1.2, [1.0] * 50).is_spike
    assert loss_level(math.nan, [1.0] * 50) is None


def test_a_slow_rank_is_named_once_an_episode(caplog: pytest.LogCaptureFixture) -> None:
    stragglers = Stragglers(["n1", "n1", "n2", "n2"])
    slow = [0.2, 0.21, 0.4, 0.2]
    for step in range(1, 8):
        assert stragglers.look(step, slow) == pytest.approx(2.0)
    assert stragglers.look(8, [0.2, 0.21, 0.22, 0.2]) == pytest.approx(1.1)
    for step in range(9, 14):
        stragglers.look(step, slow)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert caplog.messages[0] == (
        "step 5: rank 2 on n2 is slow: 0.400 s of its own work a step, the median rank 0.200 s "
        "(2.00 times, over 5 points of the log)"
    )
    assert caplog.messages[1].startswith("step 13: rank 2")


def test_ranks_that_are_slow_in_turns_are_no_stragglers(caplog: pytest.LogCaptureFixture) -> None:
    stragglers = Stragglers(["n1", "n2"])
    for step in range(20):
        stragglers.look(step, [0.4, 0.2] if step % 4 < 2 else [0.2, 0.4])
    assert not caplog.messages


def test_one_rank_is_never_slow() -> None:
    assert Stragglers(["n1"]).look(1, [0.3]) == 1.0
