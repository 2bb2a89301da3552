"""What a logged point is held against: the losses before it, and the times of the other ranks."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

SPIKE_POINTS = 100
"""Logged points that say what is usual."""
_SPIKE_MIN_POINTS = 20
_SPIKE_DEVIATIONS = 8.0
_SPIKE_FLOOR = 0.01  # of the median: a flat curve is no reason for alarm at its first ripple
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution

SLOW_RATIO = 1.3
_SLOW_POINTS = 5


@dataclass(frozen=True)
class LossLevel:
    """How a loss stands to those before it."""

    ratio: float
    """(loss - median) / deviation: how many usual deviations it lies above the usual."""
    low: float
    """Usual range, within three deviations of the median."""
    high: float

    @property
    def is_spike(self) -> bool:
        """Whether it is far outside of what is usual."""
        return self.ratio > _SPIKE_DEVIATIONS


def loss_level(loss: float, before: Sequence[float]) -> LossLevel | None:
    """Hold a loss against the median of those before it and their median deviation from it.

    Median and MAD do not move with the outliers that they are to find. None when the loss is not
    finite or there are too few points before it.
    """
    if not math.isfinite(loss) or len(before) < _SPIKE_MIN_POINTS:
        return None
    median = statistics.median(before)
    mad = statistics.median(abs(value - median) for value in before)
    deviation = max(mad * _MAD_TO_DEVIATION, abs(median) * _SPIKE_FLOOR, 1e-12)
    return LossLevel((loss - median) / deviation, median - 3 * deviation, median + 3 * deviation)


class Stragglers:
    """Watches for a rank that is slow in its own work, so that the others wait for it."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """`hosts`: the machine of every rank."""
        self._hosts = hosts
        self._rank = -1
        self._streak = 0

    def look(self, step: int, own_s: Sequence[float]) -> float:
        """Hold the slowest rank against the median; a warning when the same one stays slow.

        Args:
            step: optimizer steps done.
            own_s: seconds a step that every rank did not spend waiting for the others. (Wall times
                tell nothing: each rank waits for the slowest in every exchange.)

        Returns:
            Own time of the slowest rank over the median; of an even number of ranks the lower
            median, so that one of two can be slow.
        """
        slowest = max(range(len(own_s)), key=own_s.__getitem__)
        median = statistics.median_low(own_s)
        ratio = own_s[slowest] / median if median > 0 else 1.0
        if ratio <= SLOW_RATIO:
            self._rank, self._streak = -1, 0
            return ratio
        self._streak = self._streak + 1 if slowest == self._rank else 1
        self._rank = slowest
        if self._streak == _SLOW_POINTS:
            logger.warning(
                "step %d: rank %d on %s is slow: %.3f s of its own work a step, the median rank "
                "%.3f s (%.2f times, over %d points of the log)",
                step, slowest, self._hosts[slowest], own_s[slowest], median, ratio, _SLOW_POINTS,
            )  # fmt: skip
        return ratio
