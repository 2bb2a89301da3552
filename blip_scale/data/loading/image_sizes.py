"""The size of the training images at a position of the global order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blip_scale.config.recipe import ImageSizeRecipe


@dataclass(frozen=True)
class SizeSchedule:
    """Image sizes by the number of samples seen, so that a resumed run continues exactly."""

    final: int
    """Side of the images in pixels after all stages."""
    stages: tuple[tuple[int, int], ...] = ()
    """Pairs of a number of samples and the side of the images before it, in order."""

    @staticmethod
    def of(
        stages: Sequence[ImageSizeRecipe], final: int, steps_per_epoch: int, samples_per_step: int
    ) -> SizeSchedule:
        """The recipe's schedule. A stage ends with an optimizer step, the nearest to its epoch."""
        ends = [round(stage.until_epoch * steps_per_epoch) * samples_per_step for stage in stages]
        sizes = [stage.size for stage in stages]
        return SizeSchedule(final, tuple(zip(ends, sizes, strict=True)))

    def at(self, samples_seen: int) -> int:
        """Side of the next images in pixels."""
        for end, size in self.stages:
            if samples_seen < end:
                return size
        return self.final
