"""One optimizer step: micro-steps, one read of the device, one update."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blip_scale.engine import collectives
from blip_scale.engine.run import Run, WorstStep
from blip_scale.engine.schedule import learning_rate
from blip_scale.engine.task import Progress
from blip_scale.engine.transfers import to_device, to_host
from blip_scale.engine.watching import reporting


@dataclass
class _StepBatches:
    """Micro-batches of one optimizer step, and the host's metrics of them."""

    batches: list[Any] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    """Metrics that the host knows, summed over the micro-batches."""
    wait_s: float = 0.0
    """Seconds spent waiting for the loader."""

    def load(self, run: Run, batches: Iterator[Any]) -> Iterator[Any]:
        """Take the loader's next micro-batches. Keep them, because the step may be repeated."""
        for _ in range(run.accumulation):
            began = time.perf_counter()
            with run.heartbeat.timer.waiting_for_data():
                batch = next(batches)
            self.wait_s += time.perf_counter() - began
            self.batches.append(batch)
            for name, value in run.task.figures(batch).items():
                self.figures[name] = self.figures.get(name, 0.0) + value
            yield batch

    @property
    def ids(self) -> list[str]:
        """Ids of all samples."""
        return [name for batch in self.batches for name in batch.ids]

    @property
    def skipped(self) -> list[str]:
        """Messages about corrupt samples that were replaced."""
        return [name for batch in self.batches for name in batch.skipped]


@dataclass(frozen=True)
class _Reading:
    """Values that the host reads from the device in a step; equal on all ranks."""

    means: dict[str, float]
    """Metrics, means over micro-steps and ranks."""
    norms: dict[str, float]
    """L2 norms of the averaged gradient: `all`, and one for each tower."""
    norm: Tensor
    """Norm of the whole gradient (`all`), on the device."""
    skipped: float
    """Number of corrupt samples of all ranks."""
    stop: bool
    """Whether a rank received a signal."""


def optimizer_step(run: Run, batches: Iterator[Any]) -> bool:
    """Accumulate micro-batches, record metrics, and update if loss and gradient are finite.

    The host waits for the device once, to read metrics, gradient norms and flags together. One flag
    says whether the sampled negatives overflowed their static capacity. If so, the step is repeated
    from the same random state with enough capacity, so its result is exact.

    Returns:
        Whether the run should stop because a rank received a signal.
    """
    began = time.perf_counter()
    run.meter.reset()
    loaded = _StepBatches()
    reading = _read(run, loaded, *_micro_steps(run, loaded.load(run, batches)))
    if reading.means.pop("retry", 0.0) > 0:
        run.engine.step(0.0, apply=False, norm=reading.norm)
        run.task.after_step(run.engine, run.momentum, applied=False)
        repeated = _micro_steps(run, loaded.batches, full_capacity=True)
        reading = _read(run, loaded, *repeated)
        reading.means.pop("retry")
    means = reading.means
    rate = learning_rate(
        run.recipe.optimizer,
        run.step + run.schedule_shift,
        run.task.steps_per_epoch,
        run.recipe.train.epochs,
    )
    finite = math.isfinite(means["loss/total"]) and math.isfinite(reading.norms["all"])
    run.engine.step(rate, apply=finite, norm=reading.norm)
    run.task.after_step(run.engine, run.momentum, applied=finite)
    run.step += 1
    run.samples.add(run.step, loaded.ids)
    reporting.note_trouble(run, finite, reading.skipped, loaded.ids, loaded.skipped)
    means |= {f"gradient_norm/{name}": value for name, value in reading.norms.items()}
    means |= {"train/learning_rate": rate, "data_wait_s": loaded.wait_s}
    if means["loss/total"] > run.worst.loss:
        run.worst = WorstStep(means["loss/total"], run.step, loaded.ids)
    means |= run.meter.metrics()
    means["step_s"] = time.perf_counter() - began
    run.history.seconds += means["step_s"]
    run.history.window.append(means)
    return reading.stop


def micro_step_seed(seed: int, micro_step: int, rank: int) -> int:
    """Return the seed of a micro-step on one rank. Checkpoints then need no generator state."""
    return ((seed * 1_000_003 + micro_step) * 65_537 + rank) % 2**63  # torch accepts 63 bits


def _micro_steps(
    run: Run, batches: Iterable[Any], full_capacity: bool = False
) -> tuple[tuple[str, ...], Tensor]:
    """Run forward and backward of the step's micro-batches.

    Returns:
        Names of the network's scalars, and their sums over the micro-batches, fp32 on the device.
    """
    names: tuple[str, ...] = ()
    sums = torch.zeros(())
    for index, batch in enumerate(batches):
        micro_step = run.step * run.accumulation + index
        torch.manual_seed(micro_step_seed(run.recipe.seed, micro_step, collectives.rank()))
        progress = Progress(
            run.step, micro_step, run.task.steps_per_epoch, full_capacity, run.schedule_shift
        )
        inputs = run.task.inputs(batch, progress)
        outputs = run.micro_step(inputs, is_last=index == run.accumulation - 1)
        run.task.collect(outputs.tensors, progress)
        names = outputs.names
        sums = outputs.scalars if index == 0 else sums + outputs.scalars
    return names, sums


def _read(run: Run, loaded: _StepBatches, names: tuple[str, ...], sums: Tensor) -> _Reading:
    """Read all values of the step with one all-reduce and one wait for the device."""
    device, ranks = run.engine.device, collectives.world_size()
    host_sums = [*loaded.figures.values()]
    flags = [float(len(loaded.skipped)), float(run.interrupts.is_pending)]
    totals = collectives.all_reduce_sum(
        torch.cat(
            [sums.double(), to_device([*host_sums, *flags], device), run.engine.squared_norms()]
        )
    )
    norms = totals[-len(run.engine.norm_names) :].sqrt()
    values = iter(to_host(torch.cat([totals[: -len(norms)], norms])))
    metric_names = (*names, *loaded.figures)
    means = {name: next(values) / (run.accumulation * ranks) for name in metric_names}
    skipped, pending = next(values), next(values)
    return _Reading(
        means,
        dict(zip(run.engine.norm_names, values, strict=True)),
        norms[0],
        skipped,
        stop=pending > 0,
    )
