"""What the loop asks of a task, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from blip_scale.engine.watching.monitor import Alarm, Panel
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum


@dataclass(frozen=True)
class Progress:
    """Where a run stands: whatever is random or scheduled in a step is a function of this and the
    seed."""

    step: int
    """Optimizer steps done."""
    micro_step: int
    """Micro-steps done since the start of the run."""
    steps_per_epoch: int
    full_capacity: bool = False
    """Whether drawn texts get room for the longest draw. The loop repeats a step with it whose draw
    did not fit."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; the same on all ranks."""

    scalars: dict[str, float] = field(default_factory=dict)
    panels: dict[str, list[Panel]] = field(default_factory=dict)
    captions: list[dict[str, Any]] = field(default_factory=list)
    score: float | None = None
    """By which the best checkpoint is chosen, higher is better; None: there is no choice."""

    def with_set(
        self,
        name: str,
        figures: Mapping[str, float],
        score: float | None = None,
        panels: list[Panel] | None = None,
        captions: Sequence[dict[str, Any]] = (),
    ) -> Evaluation:
        """With the figures of one more held-out set; the score is that of the first that has
        one."""
        return Evaluation(
            self.scalars | {f"{name}/{figure}": value for figure, value in figures.items()},
            self.panels if panels is None else self.panels | {name: panels},
            [*self.captions, *captions],
            score if self.score is None else self.score,
        )


class Task(Protocol):
    """A task holds data, network and losses; the loop holds ranks, time and disks."""

    steps_per_epoch: int
    momentum_pairs: dict[str, str]
    """Momentum parameter name -> name of the parameter that it follows; empty without momentum."""
    alarms: tuple[Alarm, ...]
    """Warnings that hang on the logged metrics."""

    kernel: str
    """Attention kernel in use, for the log."""

    def build_network(self) -> nn.Module:
        """The network; its weights need mean nothing yet. Under ZeRO-3 it is called inside
        `zero.Init`."""

    def initial_weights(self) -> dict[str, Tensor]:
        """All trainable parameters by name, whole, in fp32 on the CPU; equal on all ranks."""

    def inventory(self) -> list[dict[str, Any]]:
        """The data for the run's manifest, JSON-able: a stream an object with its `name`, whatever
        identifies its content, and `files`, a list that may be long."""

    def keep_text(self, folder: Path) -> None:
        """Write what a reader of the run's checkpoints needs besides the recipe: tokenizer and
        sizes of the text stack. Rank 0 calls."""

    def batches(self) -> Iterator[Any]:
        """This rank's micro-batches for ever, from where `load_state_dict` left off.

        A batch has `ids` (of its samples) and `skipped` (what was replaced because it could not be
        read).
        """

    @property
    def capture_obstacle(self) -> str | None:
        """Why the network's forward cannot be captured in a CUDA graph; None where it can."""

    def inputs(self, batch: Any, progress: Progress) -> tuple[Any, ...]:
        """Arguments of the network for a micro-batch, on the device.

        State that lives there from step to step, such as a feature queue, is passed as the same
        tensor objects each time.
        """

    def collect(self, outputs: dict[str, Tensor], progress: Progress) -> None:
        """Take the outputs of the network that have dimensions, for `after_step`.

        The network returns a dict. Its scalars are losses and metrics; `loss/total` is what is
        minimised, and a `retry` above 0 makes the loop repeat the step with `full_capacity`.
        """

    def figures(self, batch: Any) -> dict[str, float]:
        """Metrics of a micro-batch that the host knows."""

    def after_step(self, engine: ZeroEngine, momentum: ShardedMomentum, applied: bool) -> None:
        """The side effects of an optimizer step by name: momentum, queue, temperature.

        `applied` is False when the update was skipped; then only what the step had collected is
        dropped.
        """

    def flops_per_step(self) -> float:
        """Floating-point operations of the last optimizer step on this rank."""

    def metrics(self, engine: ZeroEngine, momentum: ShardedMomentum) -> dict[str, float]:
        """Figures that cost something and are asked for only when a line is logged; all ranks take
        part."""

    def evaluate(self, engine: ZeroEngine, final: bool) -> Evaluation:
        """Held-out figures and pictures; all ranks take part. `final`: the run is over, measure it
        all."""

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What must survive a restart: JSON-able state, and tensors that are equal on all ranks."""

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""

    def close(self) -> None:
        """Let go of loader processes."""
