"""Size of the training images at each position of the global order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blip_scale.config.recipe import ImageSizeRecipe


@dataclass(frozen=True)
class SizeSchedule:
    """Image size as a function of the position alone, so a resumed run continues exactly."""

    final: int
    """Side of the images in pixels after all stages."""
    stages: tuple[tuple[tuple[int, int], int], ...] = ()
    """Stages as tuples ((epoch, sample) of the end, side of the images in pixels before it)."""

    @staticmethod
    def of(
        stages: Sequence[ImageSizeRecipe], final: int, steps_per_epoch: int, samples_per_step: int
    ) -> SizeSchedule:
        """Build the schedule of a recipe. A stage ends at the step nearest to its epoch."""
        ends = []
        for stage in stages:
            epoch, step = divmod(round(stage.until_epoch * steps_per_epoch), steps_per_epoch)
            ends.append(((epoch, step * samples_per_step), stage.size))
        return SizeSchedule(final, tuple(ends))

    def at(self, epoch: int, sample: int) -> int:
        """Side in pixels of the image at position `sample` of `epoch`."""
        for end, size in self.stages:
            if (epoch, sample) < end:
                return size
        return self.final
