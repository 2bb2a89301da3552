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
"""Steps that belong to the start, as they open the loaders and compile; batches likewise."""


class HangLimits:
    """Limit of each phase in seconds; `math.inf` for no limit.

    Retrying object storage is not a hang. Phases that wait for it have limits that are longer by
    the retry time of the recipe.
    """

    def __init__(
        self, settings: HangLimitsRecipe, data_retry_s: float = 0.0, upload_retry_s: float = 0.0
    ) -> None:
        """Measure nothing yet.

        Args:
            settings: the recipe's limits.
            data_retry_s: time for which a failing remote of a stream is retried; 0 without one.
            upload_retry_s: same for a remote of the checkpoints.
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
        """Limits of a recipe."""
        data, checkpoint = recipe.data, recipe.checkpoint
        has_remote = any(stream.remote for stream in [*data.streams, *data.heldout])
        uploads = checkpoint.folder is not None and "://" in checkpoint.folder
        return cls(
            recipe.hang_limits,
            data.retry_s if has_remote else 0.0,
            checkpoint.retry_s if uploads else 0.0,
        )

    def note_step(self, seconds: float) -> None:
        """Record the duration of a step of this start, in seconds."""
        self._steps_s.append(seconds)

    def note_batch(self, seconds: float) -> None:
        """Record the duration of a batch of an evaluation, in seconds."""
        self._batches_s.append(seconds)

    def end_batches(self) -> None:
        """Note that a loop over batches is done, and that this rank may now wait for the others."""
        self._batches_s.clear()

    def of_phase(self, phase: Phase) -> float:
        """Longest time without a beat in a phase, in seconds."""
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
        """Name of the setting in `hang_limits` that `of_phase` follows."""
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
        """Shortest limit that a phase may have, in seconds."""
        return min(self._start_s, self._evaluation_s, self._save_s, self._of_step(0.0))

    @property
    def longest_s(self) -> float:
        """Longest limit that a phase may have, in seconds."""
        return max(self._longest_beside_steps(), self._of_step(0.0) + self.data_retry_s)

    def _is_starting(self) -> bool:
        """Whether steps still belong to the start."""
        return len(self._steps_s) < _STARTING_STEPS

    def _longest_beside_steps(self) -> float:
        return max(self._start_s, self._evaluation_s, self._save_s)

    def _of_evaluation(self) -> float:
        """Limit of the batch that runs, once some were measured; else that of the evaluation."""
        if len(self._batches_s) < _STARTING_STEPS or math.isinf(self._evaluation_s):
            return self._evaluation_s
        batch_s = of_median(statistics.median(self._batches_s)) + self.data_retry_s
        return min(batch_s, self._evaluation_s)

    def _of_step(self, median_s: float) -> float:
        """Limit of a step by the median time of a step, in seconds; 0: the shortest limit."""
        return step_limit_s(self._settings, median_s, self._longest_beside_steps())


def _or_inf(limit_s: float) -> float:
    return limit_s or math.inf
