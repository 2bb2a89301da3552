"""Compare the learning rate with published figures, and with the published training loop."""

from __future__ import annotations

import itertools
import math

import pytest

from blip_scale.config import recipe
from blip_scale.config.recipe import OptimizerRecipe
from blip_scale.engine.schedule import learning_rate, warmup_leap

STEPS_PER_EPOCH = 5000
PUBLISHED = OptimizerRecipe(
    peak_lr=3e-4, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=3000, lr_decay=0.9
)


def published_loop(settings: OptimizerRecipe, epochs: int, steps: int) -> list[float]:
    """Return the learning rates of BLIP's training loop.

    Each epoch sets the rate. In epoch 0, the warm-up overwrites it in each step.
    """
    rates = []
    for epoch in range(epochs):
        by_epoch = max(settings.min_lr, settings.peak_lr * settings.lr_decay**epoch)
        for index in range(steps):
            rise = (settings.peak_lr - settings.warmup_lr) * index / settings.warmup_steps
            warm = min(settings.peak_lr, settings.warmup_lr + rise)
            rates.append(warm if epoch == 0 else by_epoch)
    return rates


@pytest.mark.parametrize(
    ("decay", "epoch", "published"),
    [
        (0.9, 1, 2.7e-4), (0.9, 5, 1.77e-4), (0.9, 10, 1.05e-4), (0.9, 19, 4.05e-5),
        (0.85, 1, 2.55e-4), (0.85, 5, 1.33e-4), (0.85, 10, 5.9e-5), (0.85, 19, 1.37e-5),
    ],
)  # fmt: skip
def test_published_rates(decay: float, epoch: int, published: float) -> None:
    """The rate decays by 0.9 (published code) or 0.85 (paper), and is constant in an epoch."""
    settings = OptimizerRecipe(lr_decay=decay)
    for step in (epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH - 1):
        assert learning_rate(settings, step, STEPS_PER_EPOCH) == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("name", ["base_14M", "base_129M"])
def test_the_base_recipes_follow_it(name: str) -> None:
    settings = recipe.load(name).optimizer
    for step in (0, 1500, 3000, 19 * STEPS_PER_EPOCH):
        expected = learning_rate(PUBLISHED, step, STEPS_PER_EPOCH)
        assert learning_rate(settings, step, STEPS_PER_EPOCH) == pytest.approx(expected)


def test_warm_up() -> None:
    """The rate rises linearly from 1e-6 to the peak at step 3000, then is constant in the epoch."""
    rates = {step: learning_rate(PUBLISHED, step, STEPS_PER_EPOCH) for step in range(5000)}
    assert rates[0] == 1e-6
    assert rates[1500] == pytest.approx((1e-6 + 3e-4) / 2)
    assert rates[3000] == rates[4999] == 3e-4
    assert all(rates[step] < rates[step + 1] for step in range(3000))


def test_a_short_first_epoch_cuts_the_warm_up() -> None:
    """At the end of epoch 0, the rate jumps to that of epoch 1, as in the published code."""
    cut = learning_rate(PUBLISHED, 999, 1000)
    assert cut == pytest.approx(1e-6 + 299e-6 * 999 / 3000)
    assert learning_rate(PUBLISHED, 1000, 1000) == pytest.approx(2.7e-4)


def test_a_warm_up_may_span_epochs() -> None:
    """The rate rises without a jump, until it reaches the decayed rate."""
    settings = OptimizerRecipe(warmup_spans_epochs=True)
    rates = [learning_rate(settings, step, 104) for step in range(6000)]
    for step in range(0, 3000, 500):
        warm, decayed = 1e-6 + 299e-6 * step / 3000, 3e-4 * 0.9 ** (step // 104)
        assert rates[step] == pytest.approx(min(warm, max(1e-6, decayed)))
    rises = [after - before for before, after in itertools.pairwise(rates)]
    assert max(rises) == pytest.approx(299e-6 / 3000)


def test_a_warm_up_that_is_cut_is_said_with_its_numbers() -> None:
    warning = warmup_leap(PUBLISHED, 104, 2000)
    assert warning is not None
    assert "3000 are more than the 104 steps of the first epoch" in warning
    assert "jumps from 1.1e-05 to 0.00027" in warning
    assert "optimizer.warmup_steps=104" in warning
    assert warmup_leap(PUBLISHED, 3000, 9000) is None
    assert warmup_leap(PUBLISHED, 104, 104) is None  # the run ends before the jump
    assert warmup_leap(OptimizerRecipe(warmup_spans_epochs=True), 104, 2000) is None
    assert warmup_leap(OptimizerRecipe(schedule="cosine"), 104, 2000) is None


@pytest.mark.parametrize("steps", [7, 40])
def test_equals_the_published_loop(steps: int) -> None:
    """The warm-up ends in the first epoch in one case, and after it in the other."""
    settings = OptimizerRecipe(peak_lr=1e-3, min_lr=2e-4, warmup_steps=20, lr_decay=0.5)
    rates = [learning_rate(settings, step, steps) for step in range(5 * steps)]
    assert rates == pytest.approx(published_loop(settings, 5, steps), rel=1e-12)
    assert rates[-1] == 2e-4  # min_lr


def test_without_a_warm_up_the_first_step_has_its_rate_and_then_the_peak() -> None:
    """BLIP avoids a division by zero: 0 warm-up steps count as 1."""
    settings = OptimizerRecipe(peak_lr=1e-3, warmup_lr=1e-3, warmup_steps=0)
    assert [learning_rate(settings, step, 100) for step in range(3)] == [1e-3] * 3
    settings = OptimizerRecipe(peak_lr=1e-3, warmup_lr=1e-6, warmup_steps=0)
    assert [learning_rate(settings, step, 100) for step in range(3)] == [1e-6, 1e-3, 1e-3]


def test_fine_tuning_follows_a_cosine_by_the_epoch() -> None:
    """As published: lr = init / 2 * (1 + cos(pi * epoch / epochs)), constant in an epoch."""
    settings = OptimizerRecipe(schedule="cosine", peak_lr=1e-5, min_lr=0.0)
    for epoch in range(6):
        expected = 1e-5 / 2 * (1 + math.cos(math.pi * epoch / 6))
        for step in (100 * epoch, 100 * epoch + 99):
            assert learning_rate(settings, step, 100, 6) == pytest.approx(expected)
    assert learning_rate(settings, 0, 100, 6) == 1e-5
    above = OptimizerRecipe(schedule="cosine", peak_lr=1e-5, min_lr=1e-6)
    assert learning_rate(above, 10_000, 100, 6) == pytest.approx(1e-6)
