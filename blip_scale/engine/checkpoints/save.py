"""Saving checkpoints during training: copy to memory, write in the background, rename atomically.

See `storage.checkpoint_format` for the files. Training pauses for the copy and for the rename.
In between, a thread on every rank writes. The rename commits the checkpoint, once every byte of
every rank is on the disk.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from blip_scale.config.recipe import CheckpointRecipe
from blip_scale.engine import collectives
from blip_scale.engine.checkpoints.background import (
    Background,
    Outcome,
    Procedure,
    attempt,
    errors_of,
)
from blip_scale.engine.checkpoints.location import Place
from blip_scale.engine.checkpoints.uploads import Uploads
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.storage import checkpoint_format, run_folder
from blip_scale.storage.checkpoint_format import Manifest

logger = logging.getLogger(__name__)

Report = Callable[[int, Mapping[str, float]], None]
"""Function that logs points of curves: step, values by name."""
Committed = Callable[[int, Path], None]
"""Function that is called on every rank for a committed checkpoint: step, folder."""


@dataclass
class RunState:
    """State of a run besides the weights.

    `position` and `task` are saved as JSON. `shared` holds tensors that are equal on all ranks.
    """

    step: int
    position: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Snapshot:
    """Copies of everything that this rank writes for a step. Later steps do not change them."""

    step: int
    contents: dict[str, checkpoint_format.Content]
    manifest: Manifest
    """Manifest without its files, which are not written yet."""


class Saver:
    """Saves checkpoints one after another. Every rank must make the same calls at equal steps."""

    def __init__(
        self,
        place: Place,
        settings: CheckpointRecipe,
        engine: ZeroEngine,
        momentum: ShardedMomentum,
        report: Report,
        committed: Committed,
        start_step: int = 0,
    ) -> None:
        """Upload the checkpoints that an earlier start did not upload.

        Args:
            place: location of the checkpoints.
            settings: how many are kept, and whether they are written in the background.
            engine: weights and moments to save.
            momentum: momentum averages to save.
            report: logs `checkpoint/pause_s`, `write_s` and `upload_s` of every checkpoint.
            committed: is called for every checkpoint once it is committed.
            start_step: step at which the run begins or resumes. Checkpoints of later steps were
                abandoned.
        """
        self._place = place
        self._settings = settings
        self._engine = engine
        self._momentum = momentum
        self._report = report
        self._committed = committed
        self.best: int | None = None
        """Step of the best checkpoint so far, which is kept; None if the task gives no score."""
        self._writing: Background | None = None
        self._is_saved = True
        self._pause_s = 0.0
        self._entered = 0.0
        steps = checkpoint_format.committed(place.folder) if place.rank == 0 else []
        steps = collectives.all_gather_objects(steps)[0]
        self._steps: list[int] = [step for step in steps if step <= start_step]
        self._uploads: Uploads | None = None
        if place.remote:
            self._uploads = Uploads(place, settings, engine.device, report)
            self._uploads.resume(self._steps)

    @property
    def newest(self) -> int:
        """Step of the newest committed checkpoint, 0 without any."""
        return max(self._steps, default=0)

    def folder_of(self, step: int) -> Path:
        """Folder of the checkpoint of a step, as this rank sees it."""
        return self._place.folder / run_folder.step_folder(step)

    def begin(self, state: RunState) -> None:
        """Copy the run and start writing it, once the previous save has ended.

        A failure is logged and affects this checkpoint alone. Its unfinished folder is removed, and
        earlier checkpoints stay intact.
        """
        self._finish_writing()
        self._pause_s = 0.0
        with self._paused():
            procedure = self._write(self._copy(state))
            self._writing = Background(procedure, self._engine.device)
        if not self._settings.background:
            self._finish_writing()

    def poll(self) -> None:
        """Commit a checkpoint that all ranks have written. Call this in every step."""
        if self._writing:
            with self._paused():
                self._writing.poll()
            if self._writing.is_done:
                self._writing = None
        if self._uploads:
            self._uploads.poll()

    def settle(self) -> bool:
        """Wait for a save in progress, but not for uploads.

        Returns:
            Whether the last save was committed.
        """
        self._finish_writing()
        return self._is_saved

    def begin_upload(self) -> None:
        """Begin to upload the newest checkpoint, so that it goes on while ranks do not poll."""
        if self._uploads:
            self._uploads.begin()

    def finish_upload_alone(self) -> None:
        """Wait a bounded time for this rank's part of an upload, without the other ranks."""
        if self._uploads:
            self._uploads.finish_alone()

    def finish(self, beat: Callable[[], None] = lambda: None) -> bool:
        """Wait for a save in progress, and for uploads as long as they move.

        Args:
            beat: is called whenever uploads have moved.

        Returns:
            Whether the last save was committed.
        """
        self._finish_writing()
        if self._uploads:
            self._uploads.finish(beat)
            kept = set(self._steps) | self._uploads.busy_with
            self._prune(self.newest, kept)  # checkpoints that were kept only for their upload
        return self._is_saved

    @property
    def is_uploaded(self) -> bool:
        """Whether object storage, where the recipe names one, has every kept checkpoint."""
        return self._uploads is None or not self._uploads.is_behind

    def _finish_writing(self) -> None:
        if self._writing:
            with self._paused():
                self._writing.finish()
            self._writing = None

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Context manager that measures a pause of the training."""
        self._entered = time.perf_counter()
        yield
        self._pause_s += time.perf_counter() - self._entered

    def _copy(self, state: RunState) -> _Snapshot:
        """Copy this rank's parameter slices to host memory.

        One rank per folder also copies the tensors that all ranks share.
        """
        engine, momentum = self._engine, self._momentum
        tensors: dict[str, Tensor] = {}
        for piece in engine.slices:
            tensors[f"weight/{piece.name}"] = piece.weight
            if engine.optimizer.state.get(piece.flat):
                for key in checkpoint_format.MOMENTS:
                    tensors[f"{key}/{piece.name}"] = piece.state(engine.optimizer, key)
        for piece, average in zip(momentum.slices, momentum.averages, strict=True):
            tensors[f"momentum/{piece.name}"] = average
        starts = {piece.name: f"{piece.start}" for piece in engine.slices}
        contents = {checkpoint_format.rank_file(self._place.rank): _copied(tensors, starts)}
        if self._place.is_first:
            contents[checkpoint_format.SHARED] = _copied(state.shared, {})
        manifest = Manifest(
            step=state.step,
            world_size=self._place.world_size,
            stage=engine.stage,
            optimizer_steps=_updates(engine),
            parameters=_sizes(engine),
            files={},
            position=copy.deepcopy(state.position),
            task=copy.deepcopy(state.task),
            frozen=list(engine.frozen),
        )
        return _Snapshot(state.step, contents, manifest)

    def _write(self, snapshot: _Snapshot) -> Procedure:
        """Write and commit a snapshot, then remove older checkpoints."""
        folder = self._place.folder
        final = folder / run_folder.step_folder(snapshot.step)
        unfinished = final.with_suffix(".partial")
        outcomes = yield partial(checkpoint_format.write, unfinished, snapshot.contents)
        errors = errors_of(outcomes)
        if not errors:
            files: dict[str, Any] = {}
            for outcome in outcomes:
                files |= outcome.value
            manifest = replace(snapshot.manifest, files=files)
            errors = self._commit(snapshot.step, manifest.to_json())
        self._is_saved = not errors
        if errors:
            if self._place.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            level = logging.ERROR if self._place.rank == 0 else logging.WARNING  # one error per run
            logger.log(
                level,
                "checkpoint of step %d was NOT saved to %s: %s. Earlier checkpoints are intact.",
                snapshot.step, folder, "; ".join(errors),
            )  # fmt: skip
            return
        pause_s = self._pause_s + time.perf_counter() - self._entered
        pause_s = max(collectives.all_gather_objects(pause_s))
        write_s = max(outcome.seconds for outcome in outcomes)
        self._report(snapshot.step, {"checkpoint/pause_s": pause_s, "checkpoint/write_s": write_s})
        where = " in the background" if self._settings.background else ""
        logger.info("saved %s (paused %.2f s, written in %.1f s%s)", final, pause_s, write_s, where)
        self._committed(snapshot.step, final)
        self._steps = sorted({*self._steps, snapshot.step})
        settings = self._settings
        kept = checkpoint_format.retained(self._steps, settings.keep_last, settings.keep_every)
        kept |= {step for step in self._steps if step == self.best}
        self._steps = sorted(kept)
        if self._uploads:
            self._uploads.add(snapshot.step, kept)
            kept = kept | self._uploads.busy_with
        yield partial(self._prune, snapshot.step, kept)

    def _commit(self, step: int, manifest: str) -> list[str]:
        """Rename the folder: one rank per folder, rank 0 first. Returns the errors of all ranks."""
        place = self._place
        final = place.folder / run_folder.step_folder(step)
        manifest = collectives.all_gather_objects(manifest if place.rank == 0 else "")[0]

        def commit() -> None:
            checkpoint_format.commit(final.with_suffix(".partial"), final, manifest)

        outcome = attempt(commit, place.rank) if place.rank == 0 else Outcome()
        errors = errors_of(collectives.all_gather_objects(outcome))
        if not place.is_shared and not errors:  # every node has its folder
            commits = place.is_first and place.rank != 0
            outcome = attempt(commit, place.rank) if commits else Outcome()
            errors = errors_of(collectives.all_gather_objects(outcome))
            if errors and place.is_first:
                shutil.rmtree(final, ignore_errors=True)
        return errors

    def _prune(self, newest: int, kept: set[int]) -> None:
        """Remove older checkpoints: one rank per folder.

        Checkpoints of later steps stay. They were damaged, and the run resumed before them. A
        failure costs a warning, and is tried again after the next save.
        """
        if not self._place.is_first:
            return
        for step in checkpoint_format.committed(self._place.folder):
            if step > newest or step in kept:
                continue
            try:
                checkpoint_format.remove(self._place.folder / run_folder.step_folder(step))
            except OSError as error:
                logger.warning("an old checkpoint can't be removed: %s", error)


def _copied(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> checkpoint_format.Content:
    """Copy tensors to pageable host memory. Pinning memory would take longer than it saves."""
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return checkpoint_format.Content(copies, metadata)


def _sizes(engine: ZeroEngine) -> dict[str, int]:
    """Number of elements of every parameter by name."""
    parameters = engine.trainable | engine.frozen
    return {name: getattr(p, "ds_numel", p.numel()) for name, p in parameters.items()}


def _updates(engine: ZeroEngine) -> int:
    """Number of updates of AdamW, for its bias correction; 0 if this rank owns no parameter."""
    assert len(engine.optimizer.param_groups) == 1, "settings of several groups would be lost"
    for piece in engine.slices:
        state = engine.optimizer.state.get(piece.flat)
        if state:
            return int(state["step"])
    return 0
