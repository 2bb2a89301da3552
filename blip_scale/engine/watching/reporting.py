"""Reports of the training loop: problems at once, metrics at intervals, a summary at the end."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch

from blip_scale.engine import collectives
from blip_scale.engine.run import Run, WorstStep
from blip_scale.engine.watching.anomalies import SPIKE_POINTS, loss_level
from blip_scale.engine.watching.monitor import peak_memory_gib
from blip_scale.storage import run_folder

logger = logging.getLogger(__name__)


def note_trouble(
    run: Run, finite: bool, skipped: float, ids: list[str], reasons: list[str]
) -> None:
    """Count and report the problems of a step. All ranks take the same branches."""
    history = run.history
    history.skipped_in_a_row = 0 if finite else history.skipped_in_a_row + 1
    history.skipped_steps += not finite
    if skipped:
        history.skipped_samples += round(skipped)
        everywhere = dict.fromkeys(chain.from_iterable(collectives.all_gather_objects(reasons)))
        for reason in everywhere:
            if reason not in run.named:
                logger.warning("skipped a sample that could not be read: %s", reason)
        run.named.update(everywhere)
    if not finite:
        shown = _of_all_ranks(ids)
        logger.warning("step %d: loss or gradient not finite, update skipped (%s)", run.step, shown)


def _of_all_ranks(ids: Sequence[str]) -> str:
    """Format the first few ids of the global batch. Call on all ranks."""
    everyone = list(chain.from_iterable(collectives.all_gather_objects(ids)))
    return ", ".join(everyone[:8]) + (", ..." if len(everyone) > 8 else "")


def sign_of_life(run: Run) -> None:
    """Write one line with the means since the last logged point, without a collective.

    Losses and gradient norms are already over all ranks. Times are of this rank only.
    """
    means = _means(run.history.window)
    step_s, data_wait_s = means["step_s"], means["data_wait_s"]
    means |= {
        "speed/samples_per_s": run.recipe.train.global_batch_size / step_s,
        "speed/data_wait_share": data_wait_s / step_s,
    }
    run.monitor.line(run.step, means)


def _means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over its finite values, or NaN if there are none.

    One skipped step therefore does not remove the point from the curves. `train/skipped_steps`
    counts skipped steps.
    """
    means = {}
    for name in window[-1]:
        finite = [step[name] for step in window if math.isfinite(step[name])]
        means[name] = sum(finite) / len(finite) if finite else math.nan
    return means


def log(run: Run) -> None:
    """Log a point: means over the steps since the last point. Call on all ranks."""
    window, recipe = run.history.window, run.recipe
    means = _means(window)
    step_s = means.pop("step_s")
    own_s = step_s - means.pop("blocked_s")
    waits = {name: means.pop(name) for name in list(means) if name.startswith("communication/")}
    here = [means.pop("data_wait_s"), peak_memory_gib(run.engine.device), own_s]
    ranks = collectives.all_gather(
        torch.tensor([here], dtype=torch.float64, device=run.engine.device)
    )
    # Use the slowest rank: the others wait for it in the next collective.
    data_wait_s, memory_gib, _ = ranks.amax(dim=0).tolist()
    own_times = ranks[:, 2].tolist()
    means |= run.task.metrics(run.engine, run.momentum)
    if run.task.reference is not None:
        means |= run.task.reference.at(run.step / run.task.steps_per_epoch)
    means |= {
        "speed/samples_per_s": recipe.train.global_batch_size / step_s,
        "speed/data_wait_share": data_wait_s / step_s,
        "speed/slowest_rank_ratio": run.stragglers.look(run.step, own_times),
        "speed/mfu": run.task.flops_per_step() / step_s / run.peak_flops,
        "memory/peak_gib": memory_gib,
        "data/skipped_samples": float(run.history.skipped_samples),
        "train/skipped_steps": float(run.history.skipped_steps),
        **run.goodput.curves(),
    }
    means |= _communication(waits, step_s, own_times)
    run.monitor.log(run.step, means | _loss_level(run, means))
    losses = {name: value for name, value in means.items() if name.startswith("loss/")}
    run.history.first = run.history.first or losses
    run.history.last = losses
    window.clear()
    run.worst = WorstStep()


def _communication(
    waits: dict[str, float], step_s: float, own_times: Sequence[float]
) -> dict[str, float]:
    """Convert waits to shares of a step: by kind on this rank, in total as the mean over ranks."""
    shares = {
        f"{name.removesuffix('_s')}_share": waits.pop(name) / step_s
        for name in list(waits)
        if name.endswith("_s")
    }
    blocked_s = step_s - sum(own_times) / len(own_times)
    return waits | shares | {"communication/blocked_share": max(0.0, blocked_s / step_s)}


def _loss_level(run: Run, means: Mapping[str, float]) -> dict[str, float]:
    """Compare the loss with previous losses. Warn once per spike.

    The warning names the samples of the worst step. Call on all ranks.
    Losses are equal on all ranks, so all ranks take the same branches.
    """
    history, loss = run.history, means["loss/total"]
    level = loss_level(loss, history.usual)
    spikes = level is not None and level.is_spike
    if level is not None and spikes and not history.is_spiking:
        logger.warning(
            "step %d: loss/total %.4g, usual is %.4g to %.4g; gradient norm %.3g; worst in step %d "
            "(%s)",
            run.step, loss, level.low, level.high, means["gradient_norm/all"], run.worst.step,
            _of_all_ranks(run.worst.ids),
        )  # fmt: skip
    history.is_spiking = spikes
    if math.isfinite(loss):
        history.usual = [*history.usual, loss][-SPIKE_POINTS:]
    ratio = max(0.0, level.ratio) if level is not None else 0.0
    return {"alarm/loss_spike": float(spikes), "alarm/loss_spike_ratio": ratio}


def has_summary(run: Run) -> bool:
    """Return True if summary.json is from this step, because an earlier start ended here."""
    file = Path(run.recipe.output_dir) / run_folder.SUMMARY
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["steps"] == run.step)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def finish(run: Run) -> None:
    """Write summary.json. If an earlier start already completed the run, keep its summary."""
    history = run.history
    if run.step == run.monitor.start_step and has_summary(run):
        logger.info("nothing left to do: all %d steps were done before", run.step)
        return
    run.monitor.summary(
        {
            "steps": run.step,
            "seconds": round(history.seconds, 1),
            "goodput": run.goodput.figures(),
            "ranks": collectives.world_size(),
            "losses_first": history.first,
            "losses_last": history.last,
            "evaluation": history.evaluation,
            "captions": history.captions,
            "best": history.best,
            "skipped_samples": history.skipped_samples,
            "skipped_steps": history.skipped_steps,
            "alarms": run.monitor.lasting_alarms(),
        }
    )
    logger.info("done: %d steps. tensorboard --logdir %s", run.step, run.recipe.output_dir)
