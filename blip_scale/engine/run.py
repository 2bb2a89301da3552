"""Objects that make up a run, and the history that a resumed run needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from blip_scale.config.recipe import Recipe
from blip_scale.engine.checkpoints.save import Saver
from blip_scale.engine.interrupts import Interrupts
from blip_scale.engine.micro_step import CapturedMicroStep, EagerMicroStep
from blip_scale.engine.task import Task
from blip_scale.engine.watching.anomalies import Stragglers
from blip_scale.engine.watching.communication import CommunicationMeter
from blip_scale.engine.watching.evaluation_record import EvaluationRecord
from blip_scale.engine.watching.goodput import Goodput
from blip_scale.engine.watching.heartbeat import Heartbeat
from blip_scale.engine.watching.monitor import Monitor
from blip_scale.engine.watching.run_manifest import RunManifest
from blip_scale.engine.watching.sample_record import SampleRecord
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum


@dataclass
class History:
    """History that a resumed run needs; saved in every checkpoint.

    A new field needs a default: older checkpoints lack it. A renamed field needs an entry in
    `_RENAMED`.
    """

    seconds: float = 0.0
    skipped_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    window: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the steps after the last logged line."""
    usual: list[float] = field(default_factory=list)
    """Values of loss/total at the last logged points."""
    is_spiking: bool = False
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    captions: list[dict[str, str]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    """`step` and `score` of the best evaluation, if the task returns a score."""
    evaluation_due: bool = False
    """Whether an evaluation follows the checkpoint. A resumed run then evaluates first."""
    alarm_streaks: dict[str, int] = field(default_factory=dict)
    """Alarm -> number of consecutive logged points at which its condition held."""
    goodput: dict[str, float] = field(default_factory=dict)
    """`Goodput.record` when the checkpoint was made."""

    def evaluated(self) -> dict[str, Any]:
        """Fields that an evaluation changes."""
        return {name: getattr(self, name) for name in _EVALUATED}

    def restore_evaluation(self, values: Mapping[str, Any]) -> None:
        """Set the fields from `evaluated`, because an earlier start already evaluated this step.

        Raises:
            KeyError: a field is missing.
        """
        for name in _EVALUATED:
            setattr(self, name, values[name])
        self.evaluation_due = False

    @classmethod
    def from_checkpoint(cls, position: dict[str, Any]) -> History:
        """Read the history from a checkpoint. Missing fields get their defaults.

        Raises:
            ValueError: the checkpoint has fields that this code doesn't know.
        """
        values = {_RENAMED.get(name, name): value for name, value in position.items()}
        unknown = sorted(values.keys() - {history_field.name for history_field in fields(cls)})
        if unknown:
            raise ValueError(
                f"the checkpoint's history has {', '.join(unknown)}, which this blip_scale doesn't "
                "know: update blip_scale, or start a new run from the checkpoint with "
                "model.checkpoint and another output_dir"
            )
        return cls(**values)


_EVALUATED = ("seconds", "evaluation", "captions", "best")

_RENAMED: dict[str, str] = {}
"""Field name in older checkpoints -> current name in `History`."""


@dataclass(frozen=True)
class WorstStep:
    """The step with the largest loss since the last logged line."""

    loss: float = -math.inf
    step: int = 0
    ids: Sequence[str] = ()
    """Ids of this rank's samples in that step."""


@dataclass
class Run:
    """Objects of a run that the train loop uses."""

    recipe: Recipe
    task: Task
    engine: ZeroEngine
    micro_step: EagerMicroStep | CapturedMicroStep
    momentum: ShardedMomentum
    saver: Saver
    monitor: Monitor
    heartbeat: Heartbeat
    goodput: Goodput
    evaluations: EvaluationRecord
    manifest: RunManifest
    samples: SampleRecord
    meter: CommunicationMeter
    stragglers: Stragglers
    interrupts: Interrupts
    total_steps: int
    accumulation: int
    peak_flops: float
    named: set[str] = field(default_factory=set)
    """Warnings about unreadable samples already logged. Each is logged once."""
    worst: WorstStep = WorstStep()
    step: int = 0
    history: History = field(default_factory=History)
    schedule_shift: int = 0
    """Steps by which the schedule is ahead of `step`; see `Task.scheduled_steps`."""
