"""Map each sample of a run to an epoch and a position in it (the run's course).

The batch size and the mixture of streams may change when a run is resumed. No sample is repeated or
dropped: the current epoch is finished in its old order, and the next one uses the new mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

CHANGEABLE = {"global_batch_size": "train.global_batch_size", "streams": "data.streams"}
"""Key of the loader's state -> setting that a resumed run may change with --allow-change."""


class Part(NamedTuple):
    """Contribution of one stream to each epoch of a mixture."""

    name: str
    samples: int
    """Samples in the stream; captions if `repeat` is `captions`."""
    samples_per_epoch: int
    offset: int = 0
    """Position in the stream at which epoch 0 begins, counted over all passes. It is negative for a
    stream that was added later."""

    def reached(self, epoch: int) -> int:
        """Position in the stream at which an epoch begins, counted over all passes."""
        return self.offset + self.samples_per_epoch * epoch


class Place(NamedTuple):
    """Position of a sample in the order of an epoch."""

    is_former: bool
    """Whether the epoch uses the mixture from before the last change."""
    epoch: int
    position: int


@dataclass(frozen=True)
class Course:
    """Course since the last change of batch size or mixture, or since the start of the run.

    The course begins at position `position` of epoch `epoch`. The next `rest` samples follow the
    order of the mixture `former`. All later epochs use the mixture `parts`.
    """

    parts: tuple[Part, ...]
    global_batch_size: int
    seen: int
    """Samples that the run had seen before this course."""
    epoch: int
    position: int
    rest: int
    """Samples left in the first epoch; a multiple of the global batch."""
    former: tuple[Part, ...]

    @classmethod
    def from_start(cls, parts: Sequence[Part], global_batch_size: int) -> Course:
        """Create the course of a new run."""
        course = cls(tuple(parts), global_batch_size, 0, 0, 0, 0, tuple(parts))
        return replace(course, rest=course.samples_per_epoch)

    @classmethod
    def from_json(cls, parts: Sequence[Part], global_batch_size: int, saved: Any) -> Course:
        """Restore a course from the result of `to_json`, which holds the offsets of `parts`."""
        offsets = dict(saved["offsets"])
        placed = [part._replace(offset=offsets[part.name]) for part in parts]
        former = tuple(Part(*part) for part in saved["former"])
        seen, epoch, position, rest = (
            int(saved[name]) for name in ("seen", "epoch", "position", "rest")
        )
        return cls(tuple(placed), global_batch_size, seen, epoch, position, rest, former)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that do not follow from the recipe, as JSON."""
        content = asdict(self)
        del content["parts"], content["global_batch_size"]
        return {**content, "offsets": {part.name: part.offset for part in self.parts}}

    @property
    def samples_per_epoch(self) -> int:
        """Samples per epoch, without the incomplete global batch."""
        total = sum(part.samples_per_epoch for part in self.parts)
        return total - total % self.global_batch_size

    def locate(self, number: int) -> Place:
        """Epoch and position of sample `number` of the run, number >= seen."""
        since = number - self.seen
        if since < self.rest:
            return Place(True, self.epoch, self.position + since)
        epochs, position = divmod(since - self.rest, self.samples_per_epoch)
        return Place(False, self.epoch + 1 + epochs, position)

    def scheduled_steps(self, number: int) -> int:
        """Completed steps of the training schedule at sample `number`, in steps of this course.

        The first epoch ends after `rest` samples, which end an epoch of the schedule too. If `rest`
        is longer than an epoch of the new mixture, the schedule counts it as one whole epoch.
        """
        epoch_steps = self.samples_per_epoch // self.global_batch_size
        rest_steps = self.rest // self.global_batch_size
        begun = max(self.epoch, 0) * epoch_steps
        completed = max(begun, (self.epoch + 1) * epoch_steps - rest_steps)
        return completed + (number - self.seen) // self.global_batch_size

    def changed(self, parts: Sequence[Part], global_batch_size: int, number: int) -> Course:
        """Return the course after a change at sample `number`.

        If a stream of the current epoch is missing or its number of samples has changed, the epoch
        ends at once. A stream whose number of samples has changed begins a new pass.

        Args:
            parts: the new mixture, without offsets.
            global_batch_size: the new global batch size.
            number: number of samples that the run has seen.
        """
        is_former, epoch, position = self.locate(number)
        current = self.former if is_former else self.parts
        sizes = {part.name: part.samples for part in parts}
        is_whole = all(sizes.get(part.name) == part.samples for part in current)
        rest = sum(part.samples_per_epoch for part in current) - position
        if position == 0:  # the epoch has not begun, so it uses the new mixture
            epoch, rest = epoch - 1, 0
        elif not is_whole:
            rest = 0
        before = {part.name: part for part in current}
        placed = []
        for part in parts:
            reached = 0
            if part.name in before:
                last = before[part.name]
                reached = last.reached(epoch + 1)
                if last.samples != part.samples:
                    reached = -(-reached // last.samples) * part.samples
            placed.append(part._replace(offset=reached - part.reached(epoch + 1)))
        rest -= rest % global_batch_size
        return Course(tuple(placed), global_batch_size, number, epoch, position, rest, current)
