"""Time limit after which a step counts as a hang. Runs and the planner use it."""

from __future__ import annotations

import math

from blip_scale.config.recipe import HangLimitsRecipe

SHORTEST_S = 180.0
"""Shortest limit that follows from a median."""
_MEDIANS = 20


def step_limit_s(settings: HangLimitsRecipe, median_s: float, longest_s: float) -> float:
    """Return the time limit of a step in seconds; infinity if there is no limit.

    Args:
        settings: the recipe's limits.
        median_s: median time of a step, in seconds.
        longest_s: longest limit of the other phases; `auto` gives at most this.
    """
    if settings.step_s == "auto":
        return min(of_median(median_s), longest_s)
    return settings.step_s or math.inf


def of_median(median_s: float) -> float:
    """Return the time limit in seconds of a unit of work (step or batch) with this median time."""
    return max(SHORTEST_S, _MEDIANS * median_s)
