"""The train loop, and around it what a run needs to be watched, stopped and started again."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_scale import logs
from blip_scale.config import exit_codes
from blip_scale.config.recipe import Recipe, to_yaml
from blip_scale.engine import collectives
from blip_scale.engine.checkpoints import restore
from blip_scale.engine.checkpoints.location import open_place
from blip_scale.engine.checkpoints.save import RunState, Saver
from blip_scale.engine.idle_gpus import refuse_idle_gpus
from blip_scale.engine.interrupts import Interrupts, StopRequested
from blip_scale.engine.micro_step import choose_micro_step
from blip_scale.engine.run import History, Run
from blip_scale.engine.run_lock import RunLock
from blip_scale.engine.schedule import warmup_leap
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
from blip_scale.errors import RefusedInput, refusing
from blip_scale.storage import files, run_folder

logger = logging.getLogger(__name__)

_ENDS = {
    exit_codes.DONE: "done",
    exit_codes.REQUEUE: "stopped on request",
    exit_codes.FAILED: "gave up",
}


def run(
    build_task: Callable[[Recipe, torch.device], Task],
    recipe: Recipe,
    ds_config: dict[str, Any],
    settle: Callable[[torch.device], tuple[Recipe, dict[str, Any]]] | None = None,
) -> int:
    """Train, or go on training, to the end of the recipe.

    Args:
        settle: gives recipe and DeepSpeed's settings anew once the ranks have met, where something
            of them depends on the devices.

    Returns:
        Exit code: 0 at the end, 75 when stopped on request with everything saved, 1 when it had to
        give up.

    Raises:
        RefusedInput: input that cannot be used, or an output folder of a run that is under way.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    lock = RunLock(Path(recipe.output_dir)) if is_main else None
    try:
        return _run(build_task, recipe, ds_config, settle)
    finally:
        if lock is not None:
            lock.release()


def _run(
    build_task: Callable[[Recipe, torch.device], Task],
    recipe: Recipe,
    ds_config: dict[str, Any],
    settle: Callable[[torch.device], tuple[Recipe, dict[str, Any]]] | None,
) -> int:
    """`run`, in a folder that is this run's."""
    rank = int(os.environ.get("RANK", "0"))
    refuse_idle_gpus()
    logs.set_up(Path(recipe.output_dir), rank)
    heartbeat = Heartbeat(Path(recipe.output_dir), rank, recipe.train.stall_timeout_s)
    meter = CommunicationMeter()
    meter.install()
    device = start(recipe.train.stall_timeout_s)
    if settle is not None:
        with refusing():
            recipe, ds_config = settle(device)
    if device.type == "cpu" and not _user_chose_threads():
        # Ranks that each take all cores slow each other down.
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // collectives.local_world_size())
        )
    if device.type == "cuda":
        # Gradient accumulation keeps the stream of its first use. A capture cannot join work of the
        # default stream, so all work goes to another one from the start.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    interrupts = Interrupts()
    with refusing():
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


def _user_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS is the user's; torchrun sets it to 1 for several ranks by itself."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return threads is not None and not (threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ)


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
    with refusing():
        weights = task.initial_weights()
        _refuse_nonfinite(weights)
    engine.fill(weights)
    momentum = ShardedMomentum(engine, task.momentum_pairs)
    place = open_place(recipe)
    state = RunState(0)
    with refusing():
        found = restore.newest_whole(place, engine.stage)
        if found is not None:
            state = restore.load(found, engine, momentum)
            task.load_state_dict(state.task, state.shared)
            logger.info("resuming at step %d from %s", state.step, found)
        history = History.from_checkpoint(state.position)
    total_steps = recipe.train.epochs * task.steps_per_epoch
    if recipe.train.max_steps is not None:
        total_steps = min(total_steps, recipe.train.max_steps)
    leap = warmup_leap(recipe.optimizer, task.steps_per_epoch, total_steps)
    if leap:
        logger.warning("%s", leap)
    monitor = Monitor(
        Path(recipe.output_dir),
        is_main=collectives.rank() == 0,
        total_steps=total_steps,
        start_step=state.step,
        samples_per_step=recipe.train.global_batch_size,
        alarms=task.alarms,
        streaks=history.alarm_streaks,
    )
    _keep_recipe(recipe, task, monitor)
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


def _refuse_nonfinite(weights: Mapping[str, Tensor]) -> None:
    """Initial weights that no step could train; the log would blame the samples.

    Raises:
        RefusedInput: names parameters that hold NaN or infinity.
    """
    spoilt = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if spoilt:
        more = f" and {len(spoilt) - 3} more parameters" if len(spoilt) > 3 else ""
        raise RefusedInput(
            f"the initial weights hold NaN or infinity in {', '.join(spoilt[:3])}{more}: give "
            "other files as model.checkpoint, model.vision.checkpoint or model.text.checkpoint"
        )


def _keep_recipe(recipe: Recipe, task: Task, monitor: Monitor) -> None:
    """The resolved recipe: in the log, beside the checkpoints, in TensorBoard; and tokenizer and
    sizes of the text stack beside the checkpoints."""
    text = to_yaml(recipe)
    logger.debug("recipe:\n%s", text)
    monitor.text("recipe", text)
    file = Path(recipe.output_dir) / run_folder.RECIPE
    if collectives.rank() == 0:
        with files.Spared(f"recipe in {file}"):
            files.write_whole(file, text)
            task.keep_text(file.with_name(run_folder.TEXT))


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
    if _is_evaluation_left(run) and not _evaluate(run):
        return exit_codes.REQUEUE
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
        # Weights that give no finite loss must not push out the checkpoints from before them.
        is_skipping = history.skipped_in_a_row > 0 and not at_end
        history.evaluation_due = at_end or not (run.step % every or stop or is_skipping)
        is_due = history.evaluation_due or stop or run.step % recipe.checkpoint.every_steps == 0
        if is_due and is_skipping:
            logger.warning("step %d: not saved, its update was skipped", run.step)
        elif is_due:
            _save(run)
        if history.evaluation_due and not _evaluate(run):
            return exit_codes.REQUEUE
    heartbeat.beat("saving")
    if not run.saver.finish():
        return exit_codes.FAILED
    if run.step < run.total_steps:
        heartbeat.beat("stopped")
        return exit_codes.REQUEUE
    reporting.finish(run)
    if not run.saver.is_uploaded:  # named in the log; the next start uploads it
        heartbeat.beat("stopped")
        return exit_codes.FAILED
    heartbeat.beat("done")
    return 0


def _is_evaluation_left(run: Run) -> bool:
    """Whether the run goes on from a checkpoint whose evaluation didn't come to its end, for all
    this checkpoint knows; the summary of a finished run tells more."""
    summary = Path(run.recipe.output_dir) / run_folder.SUMMARY
    is_finished = run.step == run.total_steps and summary.exists()
    return run.history.evaluation_due and not collectives.all_gather_objects(is_finished)[0]


def _save(run: Run) -> None:
    """Begin to write a checkpoint of this step."""
    run.heartbeat.beat("saving")
    state, shared = run.task.state_dict()
    run.saver.begin(RunState(run.step, vars(run.history), state, shared))
    run.heartbeat.beat("training")


def _evaluate(run: Run) -> bool:
    """Held-out figures and pictures, once the checkpoint of this step is on the disk.

    Returns:
        False: a signal came, and the evaluation is left to the next start.
    """
    run.heartbeat.beat("saving")
    run.saver.settle()
    run.heartbeat.beat("evaluating")
    # Uploads need all ranks, so where there are some a signal waits for the end of the evaluation.
    at_once = nullcontext() if run.saver.uploads else run.interrupts.stopping_at_once()
    try:
        with at_once:
            _note_evaluation(run)
    except StopRequested as request:
        logger.info("%s: stopping; the evaluation of step %d comes next", request, run.step)
        run.heartbeat.beat("stopped")
        return False
    run.history.evaluation_due = False
    run.heartbeat.beat("training")
    return True


def _note_evaluation(run: Run) -> None:
    """Evaluate; log the figures, and mark this step's checkpoint where it is the best so far."""
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
    if found.score is None or not math.isfinite(found.score):
        return
    if not best or found.score > best["score"]:
        run.history.best = {"step": run.step, "score": found.score}
        run.saver.best = run.step
