"""Goodput on a cluster with failures: closed forms, and the simulator against them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest

from blip_scale.planning.failures import (
    Costs,
    best_interval_s,
    goodput,
    mean_time_between_s,
    outlook,
)
from tools.benchmarks import goodput as simulation
from tools.benchmarks.goodput import Case, simulate

WEEK_S = 7 * 86_400.0


def test_published_rates_on_32_nodes() -> None:
    """A week sees about one to six failures."""
    rates = (3.8, 6.5, 26.0)
    weekly = [WEEK_S / mean_time_between_s(rate, 32) for rate in rates]
    assert weekly == pytest.approx([0.85, 1.46, 5.82], abs=0.01)


def test_the_interval_is_youngs_for_short_pauses_and_loses_least() -> None:
    costs, between_s = Costs(pause_s=5.0), 100_000.0
    best_s = best_interval_s(costs, between_s)
    assert best_s == pytest.approx(math.sqrt(2 * 5 * between_s), rel=0.01)
    best = goodput(best_s, costs, between_s)
    assert best > goodput(best_s * 1.3, costs, between_s)
    assert best > goodput(best_s / 1.3, costs, between_s)
    assert best_interval_s(Costs(pause_s=5.0, write_s=3000.0), between_s) == 3000


def test_a_run_that_fails_during_every_restart_never_gets_on() -> None:
    assert goodput(600.0, Costs(pause_s=1.0), between_s=0.1) == 0.0


def test_an_outlook_counts_in_steps() -> None:
    view = outlook(32, step_s=0.5, every_steps=1000, costs=Costs(pause_s=1.0))
    assert view.best_every_steps == pytest.approx(2 * math.sqrt(2 * 413_538), rel=0.01)
    assert view.best_goodput.expected > view.goodput.expected > 0.99
    assert view.goodput.slow < view.goodput.expected < view.goodput.fast


@pytest.mark.parametrize(
    ("costs", "between_s", "interval_s"),
    [
        (Costs(50.0, 0.0, 200.0, 0.0, 0.0), 5_000.0, 700.0),
        (Costs(1.0, 0.0, 900.0, 0.0, 0.0), 20_000.0, 600.0),
        (Costs(5.0, 0.0, 2_000.0, 0.0, 0.0), 2_000.0, 100.0),
    ],
)
def test_the_simulator_agrees_with_the_closed_form(
    costs: Costs, between_s: float, interval_s: float
) -> None:
    """The last case spends most of its time in restarts that fail."""
    case = Case(costs, between_s, interval_s)
    simulated = simulate(case, 5_000 * between_s, np.random.default_rng(1))
    assert sum(simulated.values()) == pytest.approx(1)
    expected = goodput(interval_s, costs, between_s)
    assert simulated["steps"] == pytest.approx(expected, rel=0.03)


def test_what_no_failure_leaves() -> None:
    case = Case(Costs(10.0, restart_s=0.0), math.inf, 100.0, evaluation_s=20.0, evaluate_every=2)
    shares = simulate(case, 2_400_000.0, np.random.default_rng(0))
    assert shares["steps"] == pytest.approx(200 / 240, rel=1e-3)
    assert shares["saving"] == pytest.approx(20 / 240, rel=1e-3)
    assert shares["evaluation"] == pytest.approx(20 / 240, rel=1e-3)


def test_a_checkpoint_counts_once_it_is_written() -> None:
    """A failure in the write falls back to the checkpoint before."""
    case = Case(Costs(0.0, 50.0, 0.0, 0.0, 0.0), 1e9, 100.0)
    run = simulation._Run(case, np.random.default_rng(0))
    run.failure = 340.0  # the third checkpoint is written from 300 to 350
    run.train(1000.0)
    run.lose()
    assert (run.spent["steps"], run.spent["repeated"]) == (200, 140)


def test_hangs_cost_their_limit() -> None:
    costs = Costs(0.0, 0.0, 0.0, hang_limit_s=500.0, hang_share=1.0)
    shares = simulate(Case(costs, 9_500.0, 500.0), 2e7, np.random.default_rng(0))
    assert shares["down"] == pytest.approx(0.05, rel=0.1)


def test_measured_times_come_from_a_run(tmp_path: Path) -> None:
    """A cost that an option gives is taken as it is, and one that the run lacks is assumed."""
    saves = [{"checkpoint/pause_s": pause, "checkpoint/write_s": 4.0} for pause in (1.0, 2.0, 9.0)]
    points = [{"time": 90.0 + number, **save} for number, save in enumerate(saves)]
    points += [{"time": 95.0, "heldout/r1": 0.5}, {"time": 100.0, "loss/total": 2.0}]
    attempts = [{"failed": True, "failed_at": 85.0}, {"failed": False, "failed_at": 110.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, points)))
    (tmp_path / "attempts.json").write_text(json.dumps(attempts))
    arguments = argparse.ArgumentParser()
    simulation.add_goodput(arguments.add_subparsers())
    options = arguments.parse_args(["goodput", "--run", str(tmp_path), "--write-s", "7"])
    costs, sources = simulation.costs_and_sources(options)
    assert costs == Costs(pause_s=2.0, write_s=7.0, restart_s=15.0)
    assert sources["pause_s"] == sources["restart_s"] == f"measured in {tmp_path}"
    assert (sources["write_s"], sources["hang_limit_s"]) == ("given", "assumed")
    (tmp_path / "stalls.jsonl").write_text('{"limit_s": 240.0}\n')
    assert simulation.measured(tmp_path)["hang_limit_s"] == 240
