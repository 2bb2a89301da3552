"""The train loop, with logging, evaluation, checkpoints, stopping and resuming."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
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
from blip_scale.engine.task import Evaluation, Task
from blip_scale.engine.watching import reporting
from blip_scale.engine.watching.anomalies import Stragglers
from blip_scale.engine.watching.communication import CommunicationMeter
from blip_scale.engine.watching.evaluation_record import EvaluationRecord
from blip_scale.engine.watching.goodput import Goodput
from blip_scale.engine.watching.hang_limits import HangLimits
from blip_scale.engine.watching.heartbeat import Heartbeat
from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.monitor import Monitor, measure_peak_flops
from blip_scale.engine.watching.run_manifest import RunManifest, digest, fingerprint, software
from blip_scale.engine.watching.sample_record import SampleRecord
from blip_scale.engine.zero.engine import ZeroEngine, initialize, start
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.errors import RefusedInput, refusing
from blip_scale.storage import checkpoint_format, files, run_folder

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
    allowed_changes: frozenset[str] = frozenset(),
) -> int:
    """Train to the end of the recipe. Resume from the newest complete checkpoint if there is one.

    Args:
        build_task: builds the task on the device of this rank.
        recipe: the recipe.
        ds_config: DeepSpeed's settings.
        settle: returns the recipe and DeepSpeed's settings, resolved for the devices. It is called
            once the process group is up. None if both are already final.
        allowed_changes: settings that determine the data, and may still differ from those of the
            checkpoint.

    Returns:
        Exit code: 0 at the end, 75 after a requested stop with everything saved, 1 after too many
        steps with a loss or gradient that was not finite.

    Raises:
        RefusedInput: some input is unusable, or another run owns the output folder.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    with refusing():
        lock = RunLock(Path(recipe.output_dir)) if is_main else None
    try:
        return _run(build_task, recipe, ds_config, settle, allowed_changes)
    finally:
        if lock is not None:
            lock.release()


def _run(
    build_task: Callable[[Recipe, torch.device], Task],
    recipe: Recipe,
    ds_config: dict[str, Any],
    settle: Callable[[torch.device], tuple[Recipe, dict[str, Any]]] | None,
    allowed_changes: frozenset[str],
) -> int:
    """Do the work of `run` after the output folder is locked."""
    rank = int(os.environ.get("RANK", "0"))
    refuse_idle_gpus()
    logs.set_up(Path(recipe.output_dir), rank)
    limits = HangLimits.of(recipe)
    heartbeat = Heartbeat(Path(recipe.output_dir), rank, limits)
    meter = CommunicationMeter()
    meter.install()
    device = start(limits.longest_s)
    heartbeat.timer.join(collectives.world_size(), lambda: meter.exchanges)
    if settle is not None:
        with refusing():
            recipe, ds_config = settle(device)
    if device.type == "cpu" and not _user_chose_threads():
        # Ranks slow each other down if each of them uses all cores.
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // collectives.local_world_size())
        )
    torch.set_float32_matmul_precision(recipe.train.matmul_precision)
    if device.type == "cuda":
        # Autograd accumulates gradients on the stream of their first use, and a CUDA graph can't
        # capture the default stream. All work therefore runs on another stream from the start.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    interrupts = Interrupts()
    with refusing():
        task = build_task(recipe, device)
    task.allowed_changes = allowed_changes
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
    heartbeat.close()  # not after an error: it also watches that the process ends
    return code


def _user_chose_threads() -> bool:
    """Whether the user set OMP_NUM_THREADS. With several ranks torchrun sets it to 1 itself."""
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
    """Wrap the network, and load the newest complete checkpoint if there is one."""
    engine = initialize(task.build_network, recipe, ds_config)
    with refusing():
        weights = task.initial_weights()
        _refuse_nonfinite(weights)
    engine.fill(weights)
    momentum = ShardedMomentum(engine, task.momentum_pairs)
    place = open_place(recipe)
    state = RunState(0)
    with refusing():
        checkpoint = restore.newest_whole(place, engine.stage)
        if checkpoint is not None:
            task.check_state(checkpoint_format.read_manifest(checkpoint).task)
            state = restore.load(checkpoint, engine, momentum)
            task.load_state_dict(state.task, state.shared)
            logger.info("resuming at step %d from %s", state.step, checkpoint)
        history = History.from_checkpoint(state.position)
    schedule_shift = task.scheduled_steps - state.step
    total_steps = _total_steps(recipe, task.steps_per_epoch, schedule_shift)
    if leap := warmup_leap(recipe.optimizer, task.steps_per_epoch, total_steps):
        logger.warning("%s", leap)
    shown = json.loads(logs.without_secrets(json.dumps(asdict(recipe))))
    monitor = Monitor(
        LoggedRun(Path(recipe.output_dir), state.step, shown, task.samples_seen),
        recipe.log.to,
        is_main=collectives.rank() == 0,
        total_steps=total_steps,
        samples_per_step=recipe.train.global_batch_size,
        alarms=task.alarms,
        streaks=history.alarm_streaks,
    )
    _keep_recipe(recipe, task, monitor)
    manifest = _begin_manifest(task, recipe, ds_config, heartbeat, checkpoint)
    _log_setup(recipe, task, engine, total_steps)

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
        _resumed_goodput(recipe, history),
        EvaluationRecord(recipe),
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
        schedule_shift=schedule_shift,
    )


def _log_setup(recipe: Recipe, task: Task, engine: ZeroEngine, total_steps: int) -> None:
    """Log the setup of the run."""
    logger.info(
        "%s on %d rank(s) of %s, ZeRO-%d, %s, attention by %s: %.1fM trainable parameters, "
        "%d steps of %d pairs",
        recipe.task, collectives.world_size(), engine.device.type, engine.stage,
        recipe.train.precision, task.kernel, engine.parameter_count / 1e6, total_steps,
        recipe.train.global_batch_size,
    )  # fmt: skip
    logger.info("weights are %s", engine.weights_reason)


def _resumed_goodput(recipe: Recipe, history: History) -> Goodput:
    """Return the record of earlier starts, without steps after the checkpoint."""
    goodput = Goodput(Path(recipe.output_dir), is_main=collectives.rank() == 0)
    goodput.resume(history.goodput)
    return goodput


def _total_steps(recipe: Recipe, steps_per_epoch: int, schedule_shift: int) -> int:
    """Return the number of steps in all epochs, or `train.max_steps` if that is smaller."""
    steps = recipe.train.epochs * steps_per_epoch - schedule_shift
    return steps if recipe.train.max_steps is None else min(steps, recipe.train.max_steps)


def _refuse_nonfinite(weights: Mapping[str, Tensor]) -> None:
    """Refuse initial weights that are not finite. Otherwise the log would blame the samples.

    Raises:
        RefusedInput: some parameters hold NaN or infinity.
    """
    nonfinite = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if nonfinite:
        more = f" and {len(nonfinite) - 3} more parameters" if len(nonfinite) > 3 else ""
        raise RefusedInput(
            f"the initial weights hold NaN or infinity in {', '.join(nonfinite[:3])}{more}: give "
            "other files as model.checkpoint, model.vision.checkpoint or model.text.checkpoint"
        )


def _keep_recipe(recipe: Recipe, task: Task, monitor: Monitor) -> None:
    """Write the resolved recipe to the log, to TensorBoard and beside the checkpoints.

    Write the tokenizer and the sizes of the text stack beside the checkpoints, too.
    """
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
    checkpoint: Path | None,
) -> RunManifest:
    """Record this start in the manifest: recipe, data, software, machines and checkpoint."""
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
            "from": fingerprint(checkpoint) if checkpoint is not None else None,
            "allowed_changes": sorted(task.allowed_changes),
        },
        heartbeat.before,
    )
    return manifest


def _train(run: Run) -> int:
    """Run optimizer steps to the end, with logging, evaluation and checkpoints at their intervals.

    Returns:
        The exit code; see `run`.
    """
    recipe, history, heartbeat = run.recipe, run.history, run.heartbeat
    heartbeat.beat("training", step=run.step, total_steps=run.total_steps, checkpoint_step=run.step)
    is_step_left = run.step < run.total_steps
    is_over = not is_step_left and collectives.all_gather_objects(reporting.has_summary(run))[0]
    if is_over:
        run.goodput.stop()
    is_evaluation_left = not is_over and _is_evaluation_left(run)
    run.goodput.spend("start")
    if is_evaluation_left and not _evaluate(run):
        return exit_codes.REQUEUE
    batches = run.task.batches() if is_step_left else iter(())
    stop = False
    while run.step < run.total_steps and not stop:
        stop = optimizer_step(run, batches)
        if stop:
            run.interrupts.announce()
        run.goodput.spend("repeated" if history.skipped_in_a_row else "steps")
        run.saver.poll()
        run.goodput.spend("saving")
        if history.skipped_in_a_row >= recipe.train.max_nonfinite_steps:
            logger.error(
                "giving up at step %d: loss or gradient was not finite in %d steps in a row. "
                "The last checkpoint precedes them.", run.step, history.skipped_in_a_row,
            )  # fmt: skip
            run.saver.finish()
            return exit_codes.FAILED
        at_end = run.step == run.total_steps
        run.monitor.advance(run.step)
        step_s = sum(step["step_s"] for step in history.window) / len(history.window)
        samples_per_s = recipe.train.global_batch_size / step_s
        figures = {"samples_per_s": samples_per_s, "goodput": run.goodput.figures()}
        heartbeat.beat("training", step=run.step, **figures)
        if at_end or run.step == 1 or run.step % recipe.log.every_steps == 0:
            reporting.log(run)
        elif run.monitor.is_silent(recipe.log.every_s):
            reporting.sign_of_life(run)
        run.goodput.spend("other")
        # Weights without a finite loss must not replace the last good checkpoints.
        is_skipping = history.skipped_in_a_row > 0 and not at_end
        history.evaluation_due = at_end or (_is_evaluation_step(run) and not (stop or is_skipping))
        is_due = history.evaluation_due or stop or run.step % recipe.checkpoint.every_steps == 0
        if is_due and is_skipping:
            logger.warning("step %d: no checkpoint, as its update was skipped", run.step)
        elif is_due:
            _save(run)
        if history.evaluation_due and not _evaluate(run):
            return exit_codes.REQUEUE
    heartbeat.beat("saving")
    is_saved = run.saver.finish(lambda: heartbeat.beat("saving"))
    run.goodput.spend("saving")
    if not is_saved:
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


def _is_evaluation_step(run: Run) -> bool:
    """Whether the recipe schedules an evaluation at this step."""
    every = run.recipe.evaluation.every_steps
    if every == "epoch":
        return (run.step + run.schedule_shift) % run.task.steps_per_epoch == 0
    return run.step % every == 0


def _is_evaluation_left(run: Run) -> bool:
    """Whether the run resumed from a checkpoint whose evaluation is still to be done.

    If it was done after the checkpoint was saved, its results are restored from its record.
    """
    if not run.history.evaluation_due:
        return False
    results = None
    if collectives.rank() == 0:
        checkpoint, is_final = run.saver.folder_of(run.step), run.step == run.total_steps
        results = run.evaluations.read(checkpoint, is_final)
    results = collectives.all_gather_objects(results)[0]
    if results is None:
        return True
    run.history.restore_evaluation(results)
    best = run.history.best
    run.saver.best = int(best["step"]) if best else None
    run.monitor.add_missing(run.step, run.history.evaluation)
    logger.info("step %d was evaluated before", run.step)
    return False


def _save(run: Run) -> None:
    """Start writing a checkpoint of this step."""
    run.heartbeat.beat("saving")
    state, shared = run.task.state_dict()
    run.history.goodput = run.goodput.record()
    run.saver.begin(RunState(run.step, vars(run.history), state, shared))
    run.goodput.spend("saving")
    run.heartbeat.beat("training")


def _evaluate(run: Run) -> bool:
    """Evaluate once the checkpoint of this step is on the disk.

    Returns:
        False if a signal came. The next start then runs the evaluation.
    """
    run.heartbeat.beat("saving")
    run.saver.settle()
    run.saver.begin_upload()
    run.goodput.spend("saving")
    run.heartbeat.beat("evaluating")
    began = time.perf_counter()
    try:
        with run.interrupts.stopping_at_once():
            logger.info("step %d, evaluating", run.step)  # it may take minutes
            evaluation = run.task.evaluate(run.engine, final=run.step == run.total_steps)
    except StopRequested as request:
        logger.info("%s: stopping; the evaluation of step %d comes next", request, run.step)
        run.heartbeat.beat("stopped")
        run.saver.finish_upload_alone()
        return False
    finally:
        run.goodput.spend("evaluation")
    _note_evaluation(run, evaluation, time.perf_counter() - began)
    run.goodput.spend("evaluation")
    run.history.evaluation_due = False
    run.heartbeat.beat("training")
    return True


def _note_evaluation(run: Run, evaluation: Evaluation, seconds: float) -> None:
    """Record and log the results. Mark this step's checkpoint if it is the best so far."""
    history, score = run.history, evaluation.score
    history.evaluation, history.captions = evaluation.scalars, evaluation.captions
    history.seconds += seconds
    best = history.best["score"] if history.best else -math.inf
    if score is not None and best < score < math.inf:
        history.best = {"step": run.step, "score": score}
        run.saver.best = run.step
    if collectives.rank() == 0:
        checkpoint, is_final = run.saver.folder_of(run.step), run.step == run.total_steps
        run.evaluations.write(checkpoint, is_final, history.evaluated())
    run.monitor.scalars(run.step, evaluation.scalars)
    for name, panels in evaluation.panels.items():
        run.monitor.pictures(run.step, name, panels)
    figures = "  ".join(f"{name} {value:.3g}" for name, value in evaluation.scalars.items())
    logger.info("step %d, evaluated in %.1f s: %s", run.step, seconds, figures)
