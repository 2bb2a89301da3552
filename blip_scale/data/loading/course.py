"""Course of a run through its data: the epoch and the position in it of every sample.

Batch size and mixture of the streams may change between two starts. The samples that were seen
stay seen: the present epoch is finished in its own order, and the next one has the new mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

CHANGEABLE = {"global_batch_size": "train.global_batch_size", "streams": "data.streams"}
"""Key of the loader's state -> setting that a resumed run may change, if it is allowed by name."""


class Part(NamedTuple):
    """Part that a stream has in the epochs of a mixture."""

    name: str
    samples: int
    """Samples of the whole stream, or captions where an epoch reads each of them once."""
    samples_per_epoch: int
    offset: int = 0
    """Place of epoch 0 in the stream's endless row of passes. Negative for a stream that joins a
    run later."""

    def reached(self, epoch: int) -> int:
        """Place in the row at which an epoch begins."""
        return self.offset + self.samples_per_epoch * epoch


class Place(NamedTuple):
    """Position of a sample in the order of an epoch."""

    is_former: bool
    """Whether the epoch has the mixture that was in use before the last change."""
    epoch: int
    position: int


@dataclass(frozen=True)
class Course:
    """Course since the last change of batch size or mixture, or since the start of the run.

    From the position `position` of epoch `epoch`, `rest` samples are taken in the order of the
    mixture `former`. All later epochs have the mixture `parts`.
    """

    parts: tuple[Part, ...]
    global_batch_size: int
    seen: int
    """Samples that the run had seen before."""
    epoch: int
    position: int
    rest: int
    """Multiple of the global batch."""
    former: tuple[Part, ...]

    @classmethod
    def from_start(cls, parts: Sequence[Part], global_batch_size: int) -> Course:
        """The course of a new run."""
        course = cls(tuple(parts), global_batch_size, 0, 0, 0, 0, tuple(parts))
        return replace(course, rest=course.samples_per_epoch)

    @classmethod
    def from_json(cls, parts: Sequence[Part], global_batch_size: int, saved: Any) -> Course:
        """The course that `to_json` described, with parts whose offsets it holds."""
        offsets = dict(saved["offsets"])
        placed = [part._replace(offset=offsets[part.name]) for part in parts]
        former = tuple(Part(*part) for part in saved["former"])
        seen, epoch, position, rest = (
            int(saved[name]) for name in ("seen", "epoch", "position", "rest")
        )
        return cls(tuple(placed), global_batch_size, seen, epoch, position, rest, former)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description, without what the recipe tells."""
        content = asdict(self)
        del content["parts"], content["global_batch_size"]
        return {**content, "offsets": {part.name: part.offset for part in self.parts}}

    @property
    def samples_per_epoch(self) -> int:
        """Samples of a whole epoch, without the incomplete global batch."""
        total = sum(part.samples_per_epoch for part in self.parts)
        return total - total % self.global_batch_size

    def locate(self, number: int) -> Place:
        """Place of sample `number` of the run, number >= seen."""
        since = number - self.seen
        if since < self.rest:
            return Place(True, self.epoch, self.position + since)
        epochs, position = divmod(since - self.rest, self.samples_per_epoch)
        return Place(False, self.epoch + 1 + epochs, position)

    def scheduled_steps(self, number: int) -> int:
        """Steps of the schedule that are done before sample `number`, in steps of this course.

        The present epoch ends with its rest, as an epoch of the schedule does. If the rest is
        longer than an epoch of the new mixture, the schedule takes it for a whole one.
        """
        epoch_steps = self.samples_per_epoch // self.global_batch_size
        rest_steps = self.rest // self.global_batch_size
        begun = max(self.epoch, 0) * epoch_steps
        done = max(begun, (self.epoch + 1) * epoch_steps - rest_steps)
        return done + (number - self.seen) // self.global_batch_size

    def changed(self, parts: Sequence[Part], global_batch_size: int, number: int) -> Course:
        """The course after a change at sample `number`.

        If a stream of the present epoch is missing or has another number of samples, the epoch
        ends at once. A stream with another number of samples begins a new pass.

        Args:
            parts: the new mixture, without offsets.
            global_batch_size: the new one.
            number: samples that the run has seen.
        """
        is_former, epoch, position = self.locate(number)
        present = self.former if is_former else self.parts
        sizes = {part.name: part.samples for part in parts}
        is_whole = all(sizes.get(part.name) == part.samples for part in present)
        rest = sum(part.samples_per_epoch for part in present) - position
        if position == 0:  # the epoch has not begun: it has the new mixture
            epoch, rest = epoch - 1, 0
        elif not is_whole:
            rest = 0
        before = {part.name: part for part in present}
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
        return Course(tuple(placed), global_batch_size, number, epoch, position, rest, present)
