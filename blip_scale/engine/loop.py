"""The train loop, and around it what a run needs to be watched, stopped and started again."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blip_scale.engine import collectives, logs, restore
from blip_scale.engine.checkpoint import RunState, Saver
from blip_scale.engine.deepspeed import ZeroEngine, initialize, start
from blip_scale.engine.interrupts import REQUEUE_EXIT_CODE, Interrupts
from blip_scale.engine.monitor import Monitor, measure_peak_flops, peak_memory_gib
from blip_scale.engine.places import open_place
from blip_scale.engine.schedule import learning_rate
from blip_scale.engine.sharded_momentum import ShardedMomentum
from blip_scale.engine.task import Progress, Task
from blip_scale.recipe import Recipe, to_yaml

logger = logging.getLogger(__name__)


@dataclass
class History:
    """What a restarted run must know of its past; saved in every checkpoint."""

    seconds: float = 0.0
    skipped_samples: int = 0
    skipped_in_a_row: int = 0
    window: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the steps since the last logged line."""
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    captions: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Run:
    """The parts of a run."""

    recipe: Recipe
    task: Task
    engine: ZeroEngine
    momentum: ShardedMomentum
    saver: Saver
    monitor: Monitor
    interrupts: Interrupts
    total_steps: int
    accumulation: int
    peak_flops: float
    named: set[str] = field(default_factory=set)
    """What was said of samples that could not be read: once is enough."""
    step: int = 0
    history: History = field(default_factory=History)


def run(
    build_task: Callable[[Recipe, torch.device], Task], recipe: Recipe, ds_config: dict[str, Any]
) -> int:
    """Train, or go on training, to the end of the recipe.

    Returns:
        Exit code: 0 at the end, 75 when stopped on request with everything saved, 1 when it had to
        give up.
    """
    logs.set_up(Path(recipe.output_dir), int(os.environ.get("RANK", "0")))
    device = start()
    if device.type == "cpu":  # ranks that each take all cores slow each other down
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // collectives.local_world_size())
        )
    interrupts = Interrupts()
    task = build_task(recipe, device)
    try:
        session = _open(task, recipe, ds_config, interrupts)
        try:
            return _train(session)
        finally:
            session.monitor.close()
    finally:
        task.close()
        interrupts.restore()


def _open(task: Task, recipe: Recipe, ds_config: dict[str, Any], interrupts: Interrupts) -> Run:
    """Wrap the network, and take up the newest whole checkpoint if there is one."""
    engine = initialize(task.build_network, recipe, ds_config)
    engine.fill(task.initial_weights())
    momentum = ShardedMomentum(engine, task.momentum_pairs)
    place = open_place(recipe)
    found = restore.newest_whole(place, engine.stage)
    state = RunState(0)
    if found is not None:
        state = restore.load(found, engine, momentum)
        task.load_state_dict(state.task, state.shared)
        logger.info("resuming at step %d from %s", state.step, found)
    total_steps = recipe.train.epochs * task.steps_per_epoch
    if recipe.train.max_steps is not None:
        total_steps = min(total_steps, recipe.train.max_steps)
    monitor = Monitor(
        Path(recipe.output_dir),
        is_main=collectives.rank() == 0,
        total_steps=total_steps,
        start_step=state.step,
        samples_per_step=recipe.train.global_batch_size,
        alarms=task.alarms,
    )
    _keep_recipe(recipe, monitor)
    logger.info(
        "%s on %d rank(s) of %s, ZeRO-%d, %s, attention by %s: %.1fM trainable parameters, "
        "%d steps of %d pairs",
        recipe.task, collectives.world_size(), engine.device.type, engine.stage,
        recipe.train.precision, task.kernel, engine.parameter_count / 1e6, total_steps,
        recipe.train.global_batch_size,
    )  # fmt: skip
    stated = recipe.log.peak_tflops
    return Run(
        recipe,
        task,
        engine,
        momentum,
        Saver(place, recipe.checkpoint, engine, momentum, monitor.scalars, state.step),
        monitor,
        interrupts,
        total_steps,
        accumulation=ds_config["gradient_accumulation_steps"],
        peak_flops=stated * 1e12 if stated else measure_peak_flops(engine.device, engine.dtype),
        step=state.step,
        history=History(**state.position),
    )


def _keep_recipe(recipe: Recipe, monitor: Monitor) -> None:
    """The resolved recipe: in the log, beside the checkpoints, in TensorBoard."""
    text = to_yaml(recipe)
    logger.debug("recipe:\n%s", text)
    monitor.text("recipe", text)
    if collectives.rank() == 0:
        (Path(recipe.output_dir) / "recipe.yaml").write_text(text, encoding="utf-8")


def _train(run: Run) -> int:
    """Optimizer steps to the end, with logging, evaluation and checkpoints on their intervals."""
    recipe, history = run.recipe, run.history
    batches = run.task.batches() if run.step < run.total_steps else iter(())
    stop = False
    while run.step < run.total_steps and not stop:
        _optimizer_step(run, batches)
        stop = run.interrupts.agreed(run.engine.device)
        run.saver.poll()
        if history.skipped_in_a_row >= recipe.train.max_nonfinite_steps:
            logger.error(
                "giving up at step %d: loss or gradient was not finite in %d steps in a row. "
                "The last checkpoint is from before them.", run.step, history.skipped_in_a_row,
            )  # fmt: skip
            run.saver.finish()
            return 1
        at_end = run.step == run.total_steps
        run.monitor.advance(run.step)
        if at_end or run.step == 1 or run.step % recipe.log.every_steps == 0:
            _log(run)
        if at_end or (run.step % recipe.evaluation.every_steps == 0 and not stop):
            _evaluate(run)
        if at_end or stop or run.step % recipe.checkpoint.every_steps == 0:
            state, shared = run.task.state_dict()
            run.saver.begin(RunState(run.step, vars(history), state, shared))
    if not run.saver.finish():
        return 1
    if run.step < run.total_steps:
        return REQUEUE_EXIT_CODE
    _finish(run)
    return 0


def _optimizer_step(run: Run, batches: Iterator[Any]) -> None:
    """Accumulate micro-batches, update unless something is not finite, and note the metrics."""
    began = time.perf_counter()
    deepspeed, task, recipe = run.engine.deepspeed, run.task, run.recipe
    data_wait_s = 0.0
    sums: dict[str, Any] = {}
    ids: list[str] = []
    skipped: list[str] = []
    for index in range(run.accumulation):
        waiting = time.perf_counter()
        batch = next(batches)
        data_wait_s += time.perf_counter() - waiting
        micro_step = run.step * run.accumulation + index
        torch.manual_seed(micro_step_seed(recipe.seed, micro_step, collectives.rank()))
        metrics = task.losses(
            deepspeed, batch, Progress(run.step, micro_step, task.steps_per_epoch)
        )
        deepspeed.backward(metrics["loss/total"])
        if index < run.accumulation - 1:
            deepspeed.step()
        sums = {
            name: sums.get(name, 0.0) + value.detach().float() for name, value in metrics.items()
        }
        ids += batch.ids
        skipped += batch.skipped
    means = _average(run, sums, len(skipped))
    norms = run.engine.gradient_norms()
    rate = learning_rate(recipe.optimizer, run.step, task.steps_per_epoch)
    finite = math.isfinite(means["loss/total"]) and math.isfinite(norms["all"])
    run.engine.step(rate, apply=finite)
    task.after_step(run.engine, run.momentum, applied=finite)
    run.step += 1
    _note_trouble(run, finite, means.pop("skipped"), ids, skipped)
    means |= {f"gradient_norm/{name}": value for name, value in norms.items()}
    means |= {"train/learning_rate": rate, "data_wait_s": data_wait_s}
    means["step_s"] = time.perf_counter() - began
    run.history.seconds += means["step_s"]
    run.history.window.append(means)


def micro_step_seed(seed: int, micro_step: int, rank: int) -> int:
    """Seed of all that is random in one micro-step on one rank: no generator state has to be
    saved."""
    return ((seed * 1_000_003 + micro_step) * 65_537 + rank) % 2**63  # what torch takes


def _average(run: Run, sums: dict[str, Any], skipped: int) -> dict[str, float]:
    """Mean over micro-steps and ranks of every metric, and the number of skipped samples of all
    ranks."""
    values = torch.stack([*sums.values()]) / run.accumulation
    world_size = collectives.world_size()
    values = torch.cat([values, values.new_tensor([float(skipped * world_size)])])
    return dict(zip([*sums, "skipped"], collectives.all_reduce_mean(values).tolist(), strict=True))


def _note_trouble(
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


def _log(run: Run) -> None:
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


def _evaluate(run: Run) -> None:
    """Held-out figures and pictures."""
    began = time.perf_counter()
    found = run.task.evaluate(run.engine, final=run.step == run.total_steps)
    run.monitor.scalars(run.step, found.scalars)
    for name, panels in found.panels.items():
        run.monitor.pictures(run.step, name, panels)
    run.history.evaluation, run.history.captions = found.scalars, found.captions
    seconds = time.perf_counter() - began
    run.history.seconds += seconds
    figures = "  ".join(f"{name} {value:.3g}" for name, value in found.scalars.items())
    logger.info("step %d, evaluated in %.1f s: %s", run.step, seconds, figures)


def _finish(run: Run) -> None:
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
