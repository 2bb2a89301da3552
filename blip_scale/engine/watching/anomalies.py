"""Detection of anomalies at a logged point: loss spikes and slow ranks."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

SPIKE_POINTS = 100
"""Number of previous logged points that a loss is compared with."""
_SPIKE_MIN_POINTS = 20
_SPIKE_DEVIATIONS = 8.0
_SPIKE_FLOOR = 0.01
"""Minimum deviation as a share of the median, so that noise on a flat curve is not a spike."""
_MAD_TO_DEVIATION = 1.4826  # for a normal distribution

SLOW_RATIO = 1.3
_SLOW_POINTS = 5


@dataclass(frozen=True)
class LossLevel:
    """Comparison of a loss with previous losses."""

    ratio: float
    """(loss - median) / deviation."""
    low: float
    """Lower end of the usual range, three deviations below the median."""
    high: float
    """Upper end of the usual range."""

    @property
    def is_spike(self) -> bool:
        """Whether `ratio` is above 8, far above the usual range."""
        return self.ratio > _SPIKE_DEVIATIONS


def loss_level(loss: float, before: Sequence[float]) -> LossLevel | None:
    """Compare a loss with the median of previous losses, in units of their deviation (scaled MAD).

    The median and the MAD are robust against the outliers that this function detects.

    Returns:
        None if the loss is not finite or if there are fewer than 20 previous points.
    """
    if not math.isfinite(loss) or len(before) < _SPIKE_MIN_POINTS:
        return None
    median = statistics.median(before)
    mad = statistics.median(abs(value - median) for value in before)
    deviation = max(mad * _MAD_TO_DEVIATION, abs(median) * _SPIKE_FLOOR, 1e-12)
    return LossLevel((loss - median) / deviation, median - 3 * deviation, median + 3 * deviation)


class Stragglers:
    """Detects a rank whose own work is slow, so that the others wait for it."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Create the detector. `hosts` holds the host name of each rank."""
        self._hosts = hosts
        self._rank = -1
        self._streak = 0

    def look(self, step: int, own_s: Sequence[float]) -> float:
        """Compare the slowest rank with the median. Warn if the same rank is slow at 5 points.

        Args:
            step: optimizer steps done.
            own_s: seconds per step of each rank, without waits for other ranks. Wall times are
                about equal, because each collective waits for the slowest rank.

        Returns:
            Own time of the slowest rank / lower median. With the lower median, one of two ranks
            can be slow.
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
