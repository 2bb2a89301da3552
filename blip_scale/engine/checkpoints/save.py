"""Save a run while it trains: a copy in memory, files written in the background, one atomic rename.

`storage.checkpoint_format` says what a checkpoint is made of. The training pauses for the copy and
for the rename; between them a thread of every rank writes. A checkpoint counts from the rename on,
which comes after the last rank's last byte is on the disk.
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
"""Takes points of curves: step, values by name."""
Committed = Callable[[int, Path], None]
"""Hears of a committed checkpoint: step, folder; on every rank."""


@dataclass
class RunState:
    """What is saved beside the weights.

    `position` and `task` go to JSON; `shared` holds tensors that are equal on all ranks.
    """

    step: int
    position: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Snapshot:
    """A step as this rank must write it: copies, which later steps do not touch."""

    step: int
    contents: dict[str, checkpoint_format.Content]
    manifest: Manifest
    """Without files, which are not written yet."""


class Saver:
    """Saves checkpoints one after the other; every rank makes the same calls at the same steps."""

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
        """Take up what an earlier run left to upload.

        Args:
            place: where checkpoints go.
            settings: how many are kept, and whether they are written in the background.
            engine: what is saved.
            momentum: what is saved beside it.
            report: takes `checkpoint/pause_s`, `write_s` and `upload_s` of every checkpoint.
            committed: hears of every checkpoint as soon as it counts.
            start_step: where the run begins or goes on; checkpoints of later steps are of a run
                that was given up.
        """
        self._place = place
        self._settings = settings
        self._engine = engine
        self._momentum = momentum
        self._report = report
        self._committed = committed
        self.best: int | None = None
        """Step of the best checkpoint so far, which is kept; None where none is chosen."""
        self._writing: Background | None = None
        self._is_saved = True
        self._pause_s = 0.0
        self._entered = 0.0
        mine = checkpoint_format.committed(place.folder) if place.rank == 0 else []
        found = collectives.all_gather_objects(mine)[0]
        self._steps: list[int] = [step for step in found if step <= start_step]
        self._uploads: Uploads | None = None
        if place.remote:
            self._uploads = Uploads(place, settings, engine.device, report)
            self._uploads.resume(self._steps)

    @property
    def newest(self) -> int:
        """Step of the newest committed checkpoint, 0 without any."""
        return max(self._steps, default=0)

    def begin(self, state: RunState) -> None:
        """Take a copy of the run and start to write it, after the save before has ended.

        What goes wrong is logged and costs this checkpoint alone: the unfinished folder is removed,
        every earlier one is as it was.
        """
        self._finish_writing()
        self._pause_s = 0.0
        with self._paused():
            procedure = self._write(self._copy(state))
            self._writing = Background(procedure, self._engine.device)
        if not self._settings.background:
            self._finish_writing()

    def poll(self) -> None:
        """Commit what has been written, if all ranks are done with it; to be called every step."""
        if self._writing:
            with self._paused():
                self._writing.poll()
            if self._writing.is_done:
                self._writing = None
        if self._uploads:
            self._uploads.poll()

    @property
    def uploads(self) -> bool:
        """Whether checkpoints are copied to object storage."""
        return self._uploads is not None

    def settle(self) -> bool:
        """Wait for the save that is under way, not for uploads.

        Returns:
            Whether the last save was committed.
        """
        self._finish_writing()
        return self._is_saved

    def finish(self) -> bool:
        """Wait for the save that is under way, and a bounded time for uploads.

        Returns:
            Whether the last save was committed.
        """
        self._finish_writing()
        if self._uploads:
            self._uploads.finish()
            kept = set(self._steps) | self._uploads.busy_with
            self._prune(self.newest, kept)  # what had to wait for its upload
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
        """Training stands still in here."""
        self._entered = time.perf_counter()
        yield
        self._pause_s += time.perf_counter() - self._entered

    def _copy(self, state: RunState) -> _Snapshot:
        """Copy this rank's parameter slices, and on one rank a folder what all share, to host
        memory."""
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
            parameters={
                name: getattr(parameter, "ds_numel", parameter.numel())
                for name, parameter in (engine.trainable | engine.frozen).items()
            },
            files={},
            position=copy.deepcopy(state.position),
            task=copy.deepcopy(state.task),
            frozen=list(engine.frozen),
        )
        return _Snapshot(state.step, contents, manifest)

    def _write(self, snapshot: _Snapshot) -> Procedure:
        """From the copy to a committed checkpoint, and older ones removed."""
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
            level = logging.ERROR if self._place.rank == 0 else logging.WARNING  # said once
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
        """Rename the folder, one rank a folder, rank 0 first; what went wrong."""
        place = self._place
        final = place.folder / run_folder.step_folder(step)
        manifest = collectives.all_gather_objects(manifest if place.rank == 0 else "")[0]

        def commit() -> None:
            checkpoint_format.commit(final.with_suffix(".partial"), final, manifest)

        outcome = attempt(commit, place.rank) if place.rank == 0 else Outcome()
        errors = errors_of(collectives.all_gather_objects(outcome))
        if not place.is_shared and not errors:  # each node has a folder of its own
            is_mine = place.is_first and place.rank != 0
            outcome = attempt(commit, place.rank) if is_mine else Outcome()
            errors = errors_of(collectives.all_gather_objects(outcome))
            if errors and place.is_first:
                shutil.rmtree(final, ignore_errors=True)
        return errors

    def _prune(self, newest: int, kept: set[int]) -> None:
        """Remove older checkpoints, one rank a folder.

        Those of later steps stay: a run that went back behind them found them damaged.
        """
        if self._place.is_first:
            for step in checkpoint_format.committed(self._place.folder):
                if step <= newest and step not in kept:
                    shutil.rmtree(self._place.folder / run_folder.step_folder(step))


def _copied(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> checkpoint_format.Content:
    """Into ordinary host memory: pinning it would take longer than it saves."""
    copies = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    return checkpoint_format.Content(copies, metadata)


def _updates(engine: ZeroEngine) -> int:
    """Updates that AdamW has made, for its bias correction; 0 where this rank owns nothing."""
    assert len(engine.optimizer.param_groups) == 1, "settings of several groups would be lost"
    for piece in engine.slices:
        state = engine.optimizer.state.get(piece.flat)
        if state:
            return int(state["step"])
    return 0
