"""Expected failures on a cluster, the best checkpoint interval, and the goodput.

Failures come at a constant rate. A failure costs the work since the last committed checkpoint, the
time until it is detected, and the restart. Goodput is the share of the wall time spent in optimizer
steps that are not lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from blip_scale.config.step_limit import SHORTEST_S
from blip_scale.planning.timing import Assumed

FAILURE_RATES = Assumed(slow=26.0, expected=6.5, fast=3.8)
"""Failures per 1,000 node-days: OPT-175B 26, Meta's RSC-1 6.5, Llama 3 3.8."""
COPY_BYTES_PER_S = 2e9
"""Rate at which a rank copies its part of a checkpoint to pageable host memory. A guess."""
COMMIT_S = 0.5
"""Seconds that training pauses for a checkpoint, without the copy. A guess."""
WRITE_BYTES_PER_S = 1e9
"""Rate at which a node writes its part of a checkpoint. A guess."""
RESTART_S = 120.0
"""Seconds from the detection of a failure to the next optimizer step. It is the goal for a restart
inside an allocation."""
HANG_LIMIT_S = SHORTEST_S
"""Seconds until a hang is detected, if no step takes longer than 9 s."""
HANG_SHARE = 0.25
"""Share of hangs among the failures. Other failures are detected at once. A guess."""

_WEEK_S, _DAY_S = 7 * 86_400.0, 86_400.0


@dataclass(frozen=True)
class Costs:
    """Costs of checkpoints and failures, in seconds."""

    pause_s: float
    """Time that training pauses for a checkpoint."""
    write_s: float = 0.0
    """Time from the pause until the checkpoint is committed, while training continues."""
    restart_s: float = RESTART_S
    """Time from the detection of a failure to the next optimizer step."""
    hang_limit_s: float = HANG_LIMIT_S
    """Time until a hang is detected."""
    hang_share: float = HANG_SHARE
    """Share of hangs among the failures."""

    @property
    def noticed_s(self) -> float:
        """Mean time until a failure is detected."""
        return self.hang_share * self.hang_limit_s


def costs_of(checkpoint_bytes: float, ranks: int, nodes: int) -> Costs:
    """Assumed costs of a checkpoint of `checkpoint_bytes`, split among ranks and nodes."""
    return Costs(
        pause_s=COMMIT_S + checkpoint_bytes / ranks / COPY_BYTES_PER_S,
        write_s=checkpoint_bytes / nodes / WRITE_BYTES_PER_S,
    )


def mean_time_between_s(failures_per_1000_node_days: float, nodes: int) -> float:
    """Mean seconds between two failures on a cluster."""
    return _DAY_S * 1000 / failures_per_1000_node_days / nodes


def best_interval_s(costs: Costs, between_s: float) -> float:
    """Seconds of training between two checkpoints at which the least time is lost (Daly's formula).

    It is Young's sqrt(2 * pause * between) with two more terms. A save begins only after the
    previous one is written, so the interval is at least the time of a write.

    Args:
        costs: costs of checkpoints and failures.
        between_s: mean seconds between two failures.
    """
    pause_s = costs.pause_s
    if pause_s >= 2 * between_s:
        return max(between_s, costs.write_s)
    ratio = pause_s / (2 * between_s)
    young_s = math.sqrt(2 * pause_s * between_s)
    daly_s = young_s * (1 + math.sqrt(ratio) / 3 + ratio / 9) - pause_s
    return max(daly_s, costs.write_s)


def goodput(interval_s: float, costs: Costs, between_s: float) -> float:
    """Share of the wall time in steps that are not lost, by Daly's complete model.

    Failures may occur at any time, also during a restart. The background write and the time until a
    failure is detected are counted as part of the restart.

    Args:
        interval_s: seconds of training between two checkpoints.
        costs: costs of checkpoints and failures.
        between_s: mean seconds between two failures.
    """
    restart_s = costs.restart_s + costs.noticed_s + costs.write_s
    segment_s = interval_s + costs.pause_s
    try:
        wall_s = between_s * math.exp(restart_s / between_s) * math.expm1(segment_s / between_s)
    except OverflowError:  # each restart fails, so the run makes no progress
        return 0.0
    return interval_s / wall_s


@dataclass(frozen=True)
class Outlook:
    """Expected failures of a run, and its goodput."""

    failures_a_week: Assumed
    costs: Costs
    best_every_steps: int
    """Best number of steps between two checkpoints at the expected failure rate."""
    best_goodput: Assumed
    every_steps: int
    """Steps between two checkpoints in the recipe."""
    goodput: Assumed
    """Goodput with the recipe's interval."""


def outlook(
    nodes: int,
    step_s: float,
    every_steps: int,
    costs: Costs,
    rates: Assumed = FAILURE_RATES,
) -> Outlook:
    """Compute expected failures, the best checkpoint interval, and the recipe's goodput.

    Args:
        nodes: number of machines.
        step_s: seconds of an optimizer step.
        every_steps: steps between two checkpoints in the recipe.
        costs: costs of checkpoints and failures.
        rates: failures per 1,000 node-days.
    """
    expected_s = mean_time_between_s(rates.expected, nodes)
    best = max(1, round(best_interval_s(costs, expected_s) / step_s))

    def at_rates(steps: int) -> Assumed:
        shares = []
        for rate in (rates.slow, rates.expected, rates.fast):
            shares.append(goodput(steps * step_s, costs, mean_time_between_s(rate, nodes)))
        return Assumed(*shares)

    weekly = [
        _WEEK_S / mean_time_between_s(rate, nodes)
        for rate in (rates.slow, rates.expected, rates.fast)
    ]
    return Outlook(
        Assumed(*weekly), costs, best, at_rates(best), every_steps, at_rates(every_steps)
    )
