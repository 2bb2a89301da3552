"""Output of a run: loggers, metrics.jsonl, progress on the terminal, alarms, summary.json."""

from __future__ import annotations

import datetime
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from blip_scale import logs
from blip_scale.engine import collectives
from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.loggers.registry import LoggerGroup
from blip_scale.engine.watching.pictures import Panel, draw_grid
from blip_scale.storage import files, run_folder

__all__ = ["Alarm", "Monitor", "Panel", "measure_peak_flops", "peak_memory_gib"]

logger = logging.getLogger(__name__)

_LINE = (  # metric, its short name on the terminal, format
    ("train/learning_rate", "lr", "{:.2e}"),
    ("gradient_norm/all", "grad", "{:7.3f}"),
    ("speed/samples_per_s", "samples/s", "{:6.1f}"),
    ("speed/mfu", "mfu", "{:4.0%}"),
    ("speed/data_wait_share", "wait", "{:4.0%}"),
)
_REPEATED_EVERY = 20
"""Number of logged points between two warnings of a lasting alarm."""


@dataclass(frozen=True)
class Alarm:
    """A condition that causes a warning if it holds at several consecutive logged points."""

    name: str
    """Name of the alarm. Its curve is `alarm/NAME`: 1 while the alarm lasts, else 0."""
    condition: Callable[[Mapping[str, float]], bool]
    """Function that maps the metrics of a logged point to True if they show the problem."""
    message: str
    """Text of the warning: the problem and how to fix it."""
    points: int = 5
    """Number of consecutive logged points after which the alarm begins."""


class Monitor:
    """Output of a run. On ranks other than the main one, calls have no effect.

    If the disk is full or a logger fails, points of the curves are lost. A warning is logged, and
    training continues.
    """

    def __init__(
        self,
        run: LoggedRun,
        loggers: Sequence[str],
        is_main: bool,
        total_steps: int,
        samples_per_step: int,
        alarms: Sequence[Alarm] = (),
        streaks: dict[str, int] | None = None,
    ) -> None:
        """Open the loggers and drop points after the step from which the run resumes.

        Args:
            run: folder, first step and settings of the run.
            loggers: names in `loggers.registry.LOGGERS`.
            is_main: whether this is the main rank.
            total_steps: optimizer steps of the whole run.
            samples_per_step: pairs per optimizer step, over all ranks.
            alarms: conditions to watch.
            streaks: consecutive logged points for which each condition has held, by alarm name.
                Updated in place.
        """
        self._output_dir = run.output_dir
        self._is_main = is_main
        self._total_steps = total_steps
        self.start_step = run.start_step
        self._samples_per_step = samples_per_step
        self._start_samples = run.start_step * samples_per_step
        if run.start_samples is not None:
            self._start_samples = run.start_samples
        self._alarms = alarms
        self._streaks = {} if streaks is None else streaks
        self._step = run.start_step
        self._began = time.monotonic()
        self._finished = False
        self._disk = files.Spared(f"more points of the curves in {run.output_dir}")
        self._bar: Any = None
        self._last_line = time.monotonic()
        if not is_main:
            return
        run.output_dir.mkdir(parents=True, exist_ok=True)
        self._metrics_file = run.output_dir / run_folder.METRICS
        with self._disk:
            files.take_back(self._metrics_file, run.start_step)
        self._loggers = LoggerGroup(loggers, run)
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=run.start_step, unit="step", dynamic_ncols=True,
                mininterval=0.5, smoothing=0.05, file=sys.stderr,
            )  # fmt: skip

    def advance(self, step: int) -> None:
        """Record that `step` optimizer steps are done."""
        self._step = step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def is_silent(self, seconds: float | None) -> bool:
        """Return True if no line has been logged for `seconds`. None: always False.

        Also False on ranks other than the main one, so the result differs between ranks.
        """
        waited = time.monotonic() - self._last_line
        return self._is_main and seconds is not None and waited >= seconds

    def line(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line to the terminal, without adding a point to the curves.

        Args:
            step: optimizer steps done.
            metrics: values by name. The line shows the losses and the metrics in `_LINE`.
        """
        if not self._is_main:
            return
        self._last_line = time.monotonic()
        if self._bar is not None:
            shown = {_short(name): f"{value:.3f}" for name, value in _losses(metrics).items()}
            if "speed/samples_per_s" in metrics:
                shown["samples/s"] = f"{metrics['speed/samples_per_s']:.1f}"
            self._bar.set_postfix(shown, refresh=False)
        logger.info("%s", self._line(step, metrics))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to every curve, write a line to the terminal, and check the alarms.

        Args:
            step: optimizer steps done.
            metrics: values by name (`loss/itc`, ...); the terminal shows some of them.
        """
        if not self._is_main:
            return
        curves = {
            f"alarm/{alarm.name}": float(self._lasts(alarm, metrics)) for alarm in self._alarms
        }
        self.scalars(step, {**metrics, **curves})
        self.line(step, metrics)
        for alarm in self._alarms:
            streak = self._streaks[alarm.name]
            if streak >= alarm.points and (streak - alarm.points) % _REPEATED_EVERY == 0:
                since = "" if streak == alarm.points else f" (for {streak} logged points)"
                logger.warning("step %d: %s%s", step, alarm.message, since)

    def _lasts(self, alarm: Alarm, metrics: Mapping[str, float]) -> bool:
        """Update the streak of an alarm and return whether the alarm lasts."""
        streak = self._streaks.get(alarm.name, 0) + 1 if alarm.condition(metrics) else 0
        self._streaks[alarm.name] = streak
        return streak >= alarm.points

    def lasting_alarms(self) -> dict[str, dict[str, Any]]:
        """Return the alarms that last at the newest point: name -> message and number of points."""
        return {
            alarm.name: {"message": alarm.message, "points": self._streaks[alarm.name]}
            for alarm in self._alarms
            if self._streaks.get(alarm.name, 0) >= alarm.points
        }

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to every curve and a line to metrics.jsonl, but no line on the terminal."""
        if not self._is_main:
            return
        samples = self._start_samples + (step - self.start_step) * self._samples_per_step
        head = {"samples": samples, "time": time.time()}
        with self._disk:
            files.add_line(self._metrics_file, step, {**head, **_strict(metrics)})
        self._loggers.scalars(step, {**head, **metrics})

    def add_missing(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call `scalars` unless metrics.jsonl has this point from an earlier start of the run."""
        if not self._is_main:
            return
        with self._disk:
            if files.has_line(self._metrics_file, step, metrics):
                return
        self.scalars(step, metrics)

    def pictures(self, step: int, name: str, panels: list[Panel]) -> None:
        """Log images of a held-out set, each with its generated and its true caption."""
        if self._is_main and panels:
            self._loggers.pictures(step, name, draw_grid(panels), panels)

    def text(self, name: str, text: str) -> None:
        """Log a text, such as the recipe, with credentials removed."""
        if self._is_main:
            self._loggers.text(self.start_step, name, logs.without_secrets(text))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Write summary.json atomically and mark the run as finished.

        Raises:
            OSError: the file cannot be written.
        """
        if not self._is_main:
            return
        file = self._output_dir / run_folder.SUMMARY
        files.write_whole(file, json.dumps(_strict(figures), indent=2, ensure_ascii=False) + "\n")
        self._finished = True

    def close(self) -> None:
        """Close the progress bar and the loggers."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._is_main:
            self._loggers.close(self._finished)

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        """Format an aligned line: `step   50/9000  itc 8.1234  ...  eta 0:12:34`."""
        width = len(str(self._total_steps))
        parts = [f"step {step:{width}d}/{self._total_steps}"]
        parts += [f"{_short(name)} {value:7.4f}" for name, value in _losses(metrics).items()]
        for name, short, form in _LINE:
            if name in metrics:
                parts.append(f"{short} {form.format(metrics[name])}")
        return "  ".join([*parts, f"eta {self._eta(step)}"])

    def _eta(self, step: int) -> str:
        done = step - self.start_step
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self._began) / done * (self._total_steps - step)
        return str(datetime.timedelta(seconds=round(seconds)))


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of this rank's device in a large matrix product.

    Call on all ranks. They measure at the same time, so ranks on the same cores share them as in
    training. The measurement takes about half a second.
    """
    size = 8192 if device.type == "cuda" else 512
    left, right = torch.randn(2, size, size, device=device).to(dtype)

    def product() -> float:
        began = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    product()
    collectives.barrier()
    until = time.perf_counter() + 0.4
    fastest = product()
    while time.perf_counter() < until:
        fastest = min(fastest, product())
    return 2.0 * size**3 / fastest


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of tensors on a GPU, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB


def _losses(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("loss/")}


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _strict(value: Any) -> Any:
    """Replace NaN and infinity with None, because JSON has no such values."""
    if isinstance(value, Mapping):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
