"""The size of the training images at a position of the global order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blip_scale.config.recipe import ImageSizeRecipe


@dataclass(frozen=True)
class SizeSchedule:
    """Image sizes by position alone, so that a resumed run continues exactly."""

    final: int
    """Side of the images in pixels after all stages."""
    stages: tuple[tuple[tuple[int, int], int], ...] = ()
    """End of each stage as an epoch and a sample in it, and the side of the images before it."""

    @staticmethod
    def of(
        stages: Sequence[ImageSizeRecipe], final: int, steps_per_epoch: int, samples_per_step: int
    ) -> SizeSchedule:
        """The recipe's schedule. A stage ends with an optimizer step, the nearest to its epoch."""
        ends = []
        for stage in stages:
            epoch, step = divmod(round(stage.until_epoch * steps_per_epoch), steps_per_epoch)
            ends.append(((epoch, step * samples_per_step), stage.size))
        return SizeSchedule(final, tuple(ends))

    def at(self, epoch: int, sample: int) -> int:
        """Side in pixels of an image, by its epoch and its number in the order of the epoch."""
        for end, size in self.stages:
            if (epoch, sample) < end:
                return size
        return self.final
