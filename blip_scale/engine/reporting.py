"""What the loop says of its steps: trouble at once, figures on their interval, a summary at the
end."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from blip_scale.engine import collectives
from blip_scale.engine.monitor import peak_memory_gib
from blip_scale.engine.session import Run

logger = logging.getLogger(__name__)


def note_trouble(
    run: Run, finite: bool, skipped: float, ids: list[str], reasons: list[str]
) -> None:
    """Count and name what went wrong in a step; every rank takes the same branches."""
    history = run.history
    history.skipped_in_a_row = 0 if finite else history.skipped_in_a_row + 1
    if skipped:
        history.skipped_samples += round(skipped)
        everywhere = {r: None for part in collectives.all_gather_objects(reasons) for r in part}
        for reason in (r for r in everywhere if r not in run.named):
            logger.warning("skipped a sample that could not be read: %s", reason)
        run.named.update(everywhere)
    if not finite:
        everyone = [name for part in collectives.all_gather_objects(ids) for name in part]
        shown = ", ".join(everyone[:8]) + (", ..." if len(everyone) > 8 else "")
        logger.warning("step %d: loss or gradient not finite, update skipped (%s)", run.step, shown)


def log(run: Run) -> None:
    """One line, one point in every curve: means over the steps since the last one."""
    window, recipe = run.history.window, run.recipe
    names = list(window[-1])
    means = {name: sum(step[name] for step in window) / len(window) for name in names}
    step_s = means.pop("step_s")
    data_wait_s, memory_gib = collectives.all_reduce_max(
        torch.tensor(
            [means.pop("data_wait_s"), peak_memory_gib(run.engine.device)], device=run.engine.device
        )
    ).tolist()  # of the rank that has it worst: the others wait for it in the next collective
    means |= run.task.metrics(run.engine, run.momentum)
    means |= {
        "speed/samples_per_s": recipe.train.global_batch_size / step_s,
        "speed/data_wait_share": data_wait_s / step_s,
        "speed/mfu": run.task.flops_per_step() / step_s / run.peak_flops,
        "memory/peak_gib": memory_gib,
        "data/skipped_samples": float(run.history.skipped_samples),
    }
    run.monitor.log(run.step, means)
    losses = {name: value for name, value in means.items() if name.startswith("loss/")}
    run.history.first = run.history.first or losses
    run.history.last = losses
    window.clear()


def finish(run: Run) -> None:
    """summary.json, and where to look; a run that was at its end before keeps its own."""
    history = run.history
    if (
        run.step == run.monitor.start_step
        and (Path(run.recipe.output_dir) / "summary.json").exists()
    ):
        logger.info("nothing left to do: all %d steps were done before", run.step)
        return
    run.monitor.summary(
        {
            "steps": run.step,
            "seconds": round(history.seconds, 1),
            "ranks": collectives.world_size(),
            "losses_first": history.first,
            "losses_last": history.last,
            "evaluation": history.evaluation,
            "captions": history.captions,
            "skipped_samples": history.skipped_samples,
        }
    )
    logger.info("done: %d steps. tensorboard --logdir %s", run.step, run.recipe.output_dir)
