"""The interface between the train loop and a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from blip_scale.config.loss_reference import Reference
from blip_scale.engine.watching.monitor import Alarm, Panel
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum


@dataclass(frozen=True)
class Progress:
    """Position of a run. With the seed, it determines all that is random or scheduled in a step."""

    step: int
    """Number of optimizer steps done."""
    micro_step: int
    """Number of micro-steps done since the start of the run."""
    steps_per_epoch: int
    full_capacity: bool = False
    """Whether drawn texts get room for the longest draw. The loop repeats a step with full capacity
    if its draw did not fit."""
    schedule_shift: int = 0
    """Steps by which the schedule is ahead of `step`, after a change of the batch size."""


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation; equal on all ranks."""

    scalars: dict[str, float] = field(default_factory=dict)
    panels: dict[str, list[Panel]] = field(default_factory=dict)
    captions: list[dict[str, Any]] = field(default_factory=list)
    score: float | None = None
    """Score that chooses the best checkpoint; higher is better. None: no checkpoint is chosen."""

    def with_set(
        self,
        name: str,
        figures: Mapping[str, float],
        score: float | None = None,
        panels: list[Panel] | None = None,
        captions: Sequence[dict[str, Any]] = (),
    ) -> Evaluation:
        """This evaluation with the results of another held-out set.

        The score is that of the first set that has one.
        """
        return Evaluation(
            self.scalars | {f"{name}/{figure}": value for figure, value in figures.items()},
            self.panels if panels is None else self.panels | {name: panels},
            [*self.captions, *captions],
            score if self.score is None else self.score,
        )


class Task(Protocol):
    """Data, network and losses of a run. The loop deals with ranks, time and disks."""

    steps_per_epoch: int
    allowed_changes: frozenset[str]
    """Settings that may differ from those of the checkpoint when a run resumes."""
    momentum_pairs: dict[str, str]
    """Momentum parameter name -> name of the parameter that it follows; empty without momentum."""
    alarms: tuple[Alarm, ...]
    """Warnings that depend on the logged metrics."""

    reference: Reference | None
    """Losses of `log.reference`."""

    kernel: str
    """Attention kernel in use, for the log."""

    @property
    def samples_seen(self) -> int:
        """Samples of all ranks since the start of the run, at the restored position."""

    @property
    def scheduled_steps(self) -> int:
        """Steps of the schedule that are done at the restored position.

        They differ from the optimizer steps after a change of the batch size or of the streams.
        """

    def build_network(self) -> nn.Module:
        """The network; its weights may be unset. Under ZeRO-3 this is called inside `zero.Init`."""

    def initial_weights(self) -> dict[str, Tensor]:
        """All trainable parameters by name, whole, in fp32 on the CPU; equal on all ranks."""

    def inventory(self) -> list[dict[str, Any]]:
        """JSON-able description of the data for the run's manifest, one object per stream.

        An object has the stream's `name`, the keys that identify its content, and `files`, a list
        that may be long.
        """

    def keep_text(self, folder: Path) -> None:
        """Write the files that readers of the run's checkpoints need besides the recipe.

        They are the tokenizer and the sizes of the text stack. Only rank 0 calls this.
        """

    def batches(self) -> Iterator[Any]:
        """Endless micro-batches of this rank, from the position that `load_state_dict` restored.

        A batch has `ids`, those of its samples, and `skipped`, messages about samples that were
        replaced because they could not be read.
        """

    @property
    def capture_obstacle(self) -> str | None:
        """Why the network's forward can't be captured in a CUDA graph; None if it can."""

    def inputs(self, batch: Any, progress: Progress) -> tuple[Any, ...]:
        """Arguments of the network for a micro-batch, on the device.

        State that stays on the device from step to step, such as a feature queue, must be passed as
        the same tensor objects each time.
        """

    def collect(self, outputs: dict[str, Tensor], progress: Progress) -> None:
        """Keep those outputs of the network that have dimensions, for `after_step`.

        The network returns a dict. Its scalars are losses and metrics. `loss/total` is minimised. A
        `retry` above 0 makes the loop repeat the step with `full_capacity`.
        """

    def figures(self, batch: Any) -> dict[str, float]:
        """Metrics of a micro-batch that the host knows without reading the device."""

    def after_step(self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool) -> None:
        """Update the state that follows an optimizer step: momentum, queue, temperature.

        If the update was skipped, `applied` is False. Then nothing is updated, and the outputs that
        `collect` kept are dropped.
        """

    def flops_per_step(self) -> float:
        """Floating-point operations of the last optimizer step on this rank."""

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Metrics that are too costly for every step. Called on all ranks when a line is logged."""

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Held-out metrics and pictures. Called on all ranks.

        At the end of the run `final` is True, and everything is measured.
        """

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """State to resume from: a JSON-able dict, and tensors that are equal on all ranks."""

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint with this JSON-able state before its weights are read.

        Raises:
            ValueError: the state is of other losses. The message names the setting.
        """

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the state that `state_dict` returned."""

    def close(self) -> None:
        """Stop the loader's processes."""
