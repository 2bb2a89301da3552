"""Hang limits: the longest time that a rank may spend in each phase without progress."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

from blip_scale.config.recipe import HangLimitsRecipe, Recipe
from blip_scale.config.step_limit import of_median, step_limit_s

Phase = Literal["starting", "training", "evaluating", "saving", "stopped", "done"]

_STEPS_MEASURED = 100
_STARTING_STEPS = 3
"""Number of first steps that count as part of the start, because they open the loaders and compile.
The same number of batches is measured before a batch of an evaluation has its own limit."""


class HangLimits:
    """Hang limit of each phase in seconds. `math.inf` means no limit.

    Retrying object storage is not a hang, so the retry time of the recipe is added to the limits of
    phases that wait for it.
    """

    def __init__(
        self, settings: HangLimitsRecipe, data_retry_s: float = 0.0, upload_retry_s: float = 0.0
    ) -> None:
        """Create the limits, without measured steps.

        Args:
            settings: the recipe's limits.
            data_retry_s: retry time for remotes of streams, in seconds; 0 without a remote.
            upload_retry_s: retry time for a remote checkpoint folder; 0 without one.
        """
        self._settings = settings
        self.data_retry_s = data_retry_s
        self._start_s = _or_inf(settings.start_s) + data_retry_s + upload_retry_s
        self._evaluation_s = _or_inf(settings.evaluation_s) + data_retry_s
        self._save_s = _or_inf(settings.save_s) + upload_retry_s
        self._steps_s: deque[float] = deque(maxlen=_STEPS_MEASURED)
        self._batches_s: deque[float] = deque(maxlen=_STEPS_MEASURED)

    @classmethod
    def of(cls, recipe: Recipe) -> HangLimits:
        """Create the limits from a recipe."""
        data, checkpoint = recipe.data, recipe.checkpoint
        has_remote = any(stream.remote for stream in [*data.streams, *data.heldout])
        uploads = checkpoint.folder is not None and "://" in checkpoint.folder
        return cls(
            recipe.hang_limits,
            data.retry_s if has_remote else 0.0,
            checkpoint.retry_s if uploads else 0.0,
        )

    def note_step(self, seconds: float) -> None:
        """Record the duration of a training step, in seconds."""
        self._steps_s.append(seconds)

    def note_batch(self, seconds: float) -> None:
        """Record the duration of an evaluation batch, in seconds."""
        self._batches_s.append(seconds)

    def end_batches(self) -> None:
        """Forget the measured batches after a loop, because this rank may wait for others."""
        self._batches_s.clear()

    def of_phase(self, phase: Phase) -> float:
        """Return the longest allowed time without a beat in a phase, in seconds."""
        if phase == "starting":
            return self._start_s
        if phase == "evaluating":
            return self._of_evaluation()
        if phase != "training":
            return self._save_s
        if self._is_starting():
            return max(self._start_s, self._of_step(0.0))
        return self._of_step(statistics.median(self._steps_s))

    def setting_of(self, phase: Phase) -> str:
        """Return the name of the setting in `hang_limits` that determines `of_phase`."""
        if phase == "evaluating":
            return "evaluation_s"
        if phase not in ("starting", "training"):
            return "save_s"
        is_start = phase == "starting" or (
            self._is_starting() and self.of_phase(phase) == self._start_s
        )
        return "start_s" if is_start else "step_s"

    @property
    def shortest_s(self) -> float:
        """Shortest possible limit of any phase, in seconds."""
        return min(self._start_s, self._evaluation_s, self._save_s, self._of_step(0.0))

    @property
    def longest_s(self) -> float:
        """Longest possible limit of any phase, in seconds."""
        return max(self._longest_beside_steps(), self._of_step(0.0) + self.data_retry_s)

    def _is_starting(self) -> bool:
        """Return True while steps count as part of the start."""
        return len(self._steps_s) < _STARTING_STEPS

    def _longest_beside_steps(self) -> float:
        return max(self._start_s, self._evaluation_s, self._save_s)

    def _of_evaluation(self) -> float:
        """Return the limit of the current batch. Before enough batches: of the whole evaluation."""
        if len(self._batches_s) < _STARTING_STEPS or math.isinf(self._evaluation_s):
            return self._evaluation_s
        batch_s = of_median(statistics.median(self._batches_s)) + self.data_retry_s
        return min(batch_s, self._evaluation_s)

    def _of_step(self, median_s: float) -> float:
        """Return the limit of a step from the median step time; 0 gives the shortest limit."""
        return step_limit_s(self._settings, median_s, self._longest_beside_steps())


def _or_inf(limit_s: float) -> float:
    return limit_s or math.inf
