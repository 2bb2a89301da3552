"""The train loop, and around it what a run needs to be watched, stopped and started again."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blip_scale import logs
from blip_scale.config import exit_codes
from blip_scale.config.recipe import Recipe, to_yaml
from blip_scale.engine import collectives
from blip_scale.engine.checkpoints import restore
from blip_scale.engine.checkpoints.location import open_place
from blip_scale.engine.checkpoints.save import RunState, Saver
from blip_scale.engine.interrupts import Interrupts
from blip_scale.engine.micro_step import choose_micro_step
from blip_scale.engine.run import History, Run
from blip_scale.engine.step import optimizer_step
from blip_scale.engine.task import Task
from blip_scale.engine.watching import reporting
from blip_scale.engine.watching.anomalies import Stragglers
from blip_scale.engine.watching.communication import CommunicationMeter
from blip_scale.engine.watching.heartbeat import Heartbeat
from blip_scale.engine.watching.monitor import Monitor, measure_peak_flops
from blip_scale.engine.watching.run_manifest import RunManifest, digest, fingerprint, software
from blip_scale.engine.watching.sample_record import SampleRecord
from blip_scale.engine.zero.engine import initialize, start
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.storage import run_folder

logger = logging.getLogger(__name__)

_ENDS = {
    exit_codes.DONE: "done",
    exit_codes.REQUEUE: "stopped on request",
    exit_codes.FAILED: "gave up",
}


def run(
    build_task: Callable[[Recipe, torch.device], Task], recipe: Recipe, ds_config: dict[str, Any]
) -> int:
    """Train, or go on training, to the end of the recipe.

    Returns:
        Exit code: 0 at the end, 75 when stopped on request with everything saved, 1 when it had to
        give up.
    """
    rank = int(os.environ.get("RANK", "0"))
    logs.set_up(Path(recipe.output_dir), rank)
    heartbeat = Heartbeat(Path(recipe.output_dir), rank, recipe.train.stall_timeout_s)
    meter = CommunicationMeter()
    meter.install()
    device = start(recipe.train.stall_timeout_s)
    if device.type == "cpu":  # ranks that each take all cores slow each other down
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // collectives.local_world_size())
        )
    if device.type == "cuda":
        # Gradient accumulation keeps the stream of its first use. A capture cannot join work of the
        # default stream, so all work goes to another one from the start.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    interrupts = Interrupts()
    task = build_task(recipe, device)
    try:
        session = _open(task, recipe, ds_config, heartbeat, meter, interrupts)
        try:
            code = _train(session)
            session.manifest.ended(session.step, _ENDS[code])
        except BaseException as error:
            session.manifest.ended(session.step, f"{type(error).__name__}: {error}")
            raise
        finally:
            session.monitor.close()
    finally:
        task.close()
        interrupts.restore()
    heartbeat.close()  # not after an error: it guards the way out as well
    return code


def _open(
    task: Task,
    recipe: Recipe,
    ds_config: dict[str, Any],
    heartbeat: Heartbeat,
    meter: CommunicationMeter,
    interrupts: Interrupts,
) -> Run:
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
    manifest = _begin_manifest(task, recipe, ds_config, heartbeat, found)
    logger.info(
        "%s on %d rank(s) of %s, ZeRO-%d, %s, attention by %s: %.1fM trainable parameters, "
        "%d steps of %d pairs",
        recipe.task, collectives.world_size(), engine.device.type, engine.stage,
        recipe.train.precision, task.kernel, engine.parameter_count / 1e6, total_steps,
        recipe.train.global_batch_size,
    )  # fmt: skip

    logger.info("weights are %s", engine.weights_reason)

    def committed(step: int, folder: Path) -> None:
        manifest.saved(step, folder)
        heartbeat.beat("training", checkpoint_step=step)

    stated = recipe.log.peak_tflops
    history = History.from_checkpoint(state.position)
    saver = Saver(
        place, recipe.checkpoint, engine, momentum, monitor.scalars, committed, state.step
    )
    saver.best = int(history.best["step"]) if history.best else None
    return Run(
        recipe,
        task,
        engine,
        choose_micro_step(engine, recipe.model.cuda_graph, task.capture_obstacle),
        momentum,
        saver,
        monitor,
        heartbeat,
        manifest,
        SampleRecord(Path(recipe.output_dir), state.step, recipe.log.sample_ids),
        meter,
        Stragglers(collectives.all_gather_objects(socket.gethostname())),
        interrupts,
        total_steps,
        accumulation=ds_config["gradient_accumulation_steps"],
        peak_flops=stated * 1e12 if stated else measure_peak_flops(engine.device, engine.dtype),
        step=state.step,
        history=history,
    )


def _keep_recipe(recipe: Recipe, monitor: Monitor) -> None:
    """The resolved recipe: in the log, beside the checkpoints, in TensorBoard."""
    text = to_yaml(recipe)
    logger.debug("recipe:\n%s", text)
    monitor.text("recipe", text)
    if collectives.rank() == 0:
        (Path(recipe.output_dir) / run_folder.RECIPE).write_text(text, encoding="utf-8")


def _begin_manifest(
    task: Task,
    recipe: Recipe,
    ds_config: dict[str, Any],
    heartbeat: Heartbeat,
    found: Path | None,
) -> RunManifest:
    """Note this start: from what, on which machines, and from which checkpoint."""
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(collectives.all_gather_objects(socket.gethostname())):
        nodes.setdefault(host, []).append(rank)
    manifest = RunManifest(Path(recipe.output_dir), is_main=collectives.rank() == 0)
    manifest.begin(
        {"recipe": asdict(recipe), "deepspeed": ds_config, "data": task.inventory(), **software()},
        {
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "world_size": collectives.world_size(),
            "nodes": nodes,
            "recipe_xxh64": digest(to_yaml(recipe).encode()),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "from": fingerprint(found) if found is not None else None,
        },
        heartbeat.before,
    )
    return manifest


def _train(run: Run) -> int:
    """Optimizer steps to the end, with logging, evaluation and checkpoints on their intervals."""
    recipe, history, heartbeat = run.recipe, run.history, run.heartbeat
    heartbeat.beat("training", step=run.step, total_steps=run.total_steps, checkpoint_step=run.step)
    batches = run.task.batches() if run.step < run.total_steps else iter(())
    stop = False
    while run.step < run.total_steps and not stop:
        stop = optimizer_step(run, batches)
        if stop:
            run.interrupts.announce()
        run.saver.poll()
        if history.skipped_in_a_row >= recipe.train.max_nonfinite_steps:
            logger.error(
                "giving up at step %d: loss or gradient was not finite in %d steps in a row. "
                "The last checkpoint is from before them.", run.step, history.skipped_in_a_row,
            )  # fmt: skip
            run.saver.finish()
            return exit_codes.FAILED
        at_end = run.step == run.total_steps
        run.monitor.advance(run.step)
        step_s = sum(step["step_s"] for step in history.window) / len(history.window)
        samples_per_s = recipe.train.global_batch_size / step_s
        heartbeat.beat("training", step=run.step, samples_per_s=samples_per_s)
        if at_end or run.step == 1 or run.step % recipe.log.every_steps == 0:
            reporting.log(run)
        elif run.monitor.is_silent(recipe.log.every_s):
            reporting.sign_of_life(run)
        every = recipe.evaluation.every_steps
        every = run.task.steps_per_epoch if every == "epoch" else every
        is_best = False
        if at_end or (run.step % every == 0 and not stop):
            heartbeat.beat("evaluating")
            is_best = _evaluate(run)
            heartbeat.beat("training")
        if at_end or stop or is_best or run.step % recipe.checkpoint.every_steps == 0:
            heartbeat.beat("saving")
            state, shared = run.task.state_dict()
            run.saver.begin(RunState(run.step, vars(history), state, shared))
            heartbeat.beat("training")
    heartbeat.beat("saving")
    if not run.saver.finish():
        return exit_codes.FAILED
    if run.step < run.total_steps:
        heartbeat.beat("stopped")
        return exit_codes.REQUEUE
    reporting.finish(run)
    heartbeat.beat("done")
    return 0


def _evaluate(run: Run) -> bool:
    """Held-out figures and pictures; whether the score is the best so far."""
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
    best = run.history.best
    if found.score is None or (best and found.score <= best["score"]):
        return False
    run.history.best = {"step": run.step, "score": found.score}
    run.saver.best = run.step
    return True
