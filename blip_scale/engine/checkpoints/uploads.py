"""Uploads of committed checkpoints to object storage, in the background.

Every rank uploads its share of the files. The manifest is uploaded last, once the storage lists all
other files with their sizes. A checkpoint with a manifest is therefore complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from blip_scale.config.recipe import CheckpointRecipe
from blip_scale.engine.checkpoints.background import (
    Background,
    Outcome,
    Procedure,
    attempt,
    errors_of,
)
from blip_scale.engine.checkpoints.location import Place
from blip_scale.storage import checkpoint_format, run_folder
from blip_scale.storage.objects import ObjectFolder

logger = logging.getLogger(__name__)

_READY_S = 10.0
"""Maximum time in which the storage must list the files of a checkpoint."""
_ALONE_S = 45.0
"""Time to finish an upload without the other ranks. SLURM's scripts give ranks a minute from the
end of the first one."""
_LISTED_EVERY_S = 1.0


class Uploads:
    """Queue of checkpoints to upload, newest first. Every rank must make the same calls."""

    def __init__(
        self,
        place: Place,
        settings: CheckpointRecipe,
        device: torch.device,
        report: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        """See `Saver` for the arguments."""
        assert place.remote is not None
        self._place = place
        self._remote: ObjectFolder = place.remote
        self._settings = settings
        self._device = device
        self._report = report
        self._waiting: list[int] = []
        self._job: Background | None = None
        self._under_way: int | None = None
        self._is_sending = False

    def resume(self, steps: list[int]) -> None:
        """Upload those of these committed checkpoints that the storage lacks."""
        self._waiting = sorted(steps)
        self._start()

    @property
    def busy_with(self) -> set[int]:
        """Step that is being uploaded, if any. Its checkpoint must not be removed yet."""
        return set() if self._under_way is None else {self._under_way}

    @property
    def is_behind(self) -> bool:
        """Whether the storage lacks a checkpoint that it should have."""
        return bool(self._waiting)

    def add(self, step: int, kept: set[int]) -> None:
        """Upload a checkpoint that was just committed. Drop queued ones that are not `kept`."""
        self._waiting = sorted({*self._waiting, step} & kept)
        self._start()

    def poll(self) -> None:
        """Continue the upload if all ranks have finished their work."""
        if self._job:
            self._job.poll()

    def finish(self, beat: Callable[[], None]) -> None:
        """Wait until all is uploaded, or nothing progresses for `retry_s`. Warn about the rest.

        Args:
            beat: is called on progress.
        """
        patience_s = self._settings.retry_s
        for is_again in (False, True):  # the running upload, then those that it left queued
            if is_again:
                self._start()
            if self._job:
                patience_s -= self._job.finish_while_moving(
                    patience_s, lambda: self._remote.progress, beat
                )
        if self._waiting:
            names = ", ".join(map(run_folder.step_folder, self._waiting))
            logger.warning(
                "%s not uploaded to %s. It is complete in %s; start the same command again to "
                "upload it.",
                names, self._remote.url, self._place.folder,
            )  # fmt: skip

    def begin(self) -> None:
        """Begin to upload a checkpoint that was just added, unless another upload is in progress.

        Each rank then uploads its files independently until the next `poll`.
        """
        if self._job:
            self._job.join(_READY_S)
            self._job.poll()  # on all ranks, also where the work has not ended

    def finish_alone(self) -> None:
        """Upload the rest of this rank's files, when the ranks can no longer communicate.

        Rank 0 commits the checkpoint once the storage lists the files of all ranks. The next start
        uploads files that did not arrive in time.
        """
        step, until = self._under_way, time.monotonic() + _ALONE_S
        if self._job is None or step is None or not self._is_sending:
            return
        is_committed = False
        if self._job.join(_ALONE_S) and self._place.rank == 0:
            while not is_committed and time.monotonic() < until:
                outcome = attempt(partial(self._commit, step), self._place.rank)
                is_committed = not outcome.error
                time.sleep(0 if is_committed else _LISTED_EVERY_S)
        if self._place.rank == 0:
            end = "uploaded" if is_committed else "not uploaded yet, the next start does it"
            logger.info("%s: %s", run_folder.step_folder(step), end)

    def _start(self) -> None:
        if self._waiting and (self._job is None or self._job.is_done):
            self._job = Background(self._upload_all(), self._device)

    def _upload_all(self) -> Procedure:
        """Upload queued checkpoints until the queue is empty or the storage fails."""
        while self._waiting:
            step = self._under_way = self._waiting[-1]
            began = time.perf_counter()
            errors: list[str] = []
            for work in (self._make_ready, self._upload_share, self._commit):
                self._is_sending = work == self._upload_share
                outcomes: list[Outcome] = yield partial(work, step)
                errors = errors_of(outcomes)
                if errors or outcomes[0].value is True:  # True: the storage has it already
                    break
            self._under_way, self._is_sending = None, False
            name = run_folder.step_folder(step)
            if errors:
                logger.warning(
                    "%s was not uploaded: %s. It is complete in %s; the upload is retried after "
                    "the next save.",
                    name, "; ".join(errors), self._place.folder,
                )  # fmt: skip
                return
            self._waiting = [queued for queued in self._waiting if queued != step]
            if outcomes[0].value is not True:
                seconds = time.perf_counter() - began
                self._report(step, {"checkpoint/upload_s": seconds})
                logger.info("uploaded %s to %s in %.1f s", name, self._remote.url, seconds)

    def _make_ready(self, step: int) -> bool:
        """On rank 0, whether the storage already has this checkpoint.

        A different checkpoint of the same step, complete or not, is deleted. A mixture of both can
        then never count as complete.
        """
        if self._place.rank != 0:
            return False
        folder = run_folder.step_folder(step)
        manifest = f"{folder}/{checkpoint_format.MANIFEST}"
        there = [*self._remote.sizes(folder)]
        if manifest in there:
            if self._remote.get(manifest) == (self._place.folder / manifest).read_bytes():
                return True
            self._remote.delete([manifest])
        self._remote.delete(name for name in there if name != manifest)
        return False

    def _upload_share(self, step: int) -> None:
        """Upload this rank's share of the local files."""
        folder = self._place.folder / run_folder.step_folder(step)
        # Each node has the shared file, and one copy is enough.
        left_out = {checkpoint_format.MANIFEST} | (
            {checkpoint_format.SHARED} if 0 not in self._place.sharers else set()
        )
        here = sorted({path.name for path in folder.iterdir()} - left_out)
        for name in self._place.share(here):
            self._remote.put(f"{folder.name}/{name}", folder / name)

    def _commit(self, step: int) -> None:
        """On rank 0, check that all files arrived, upload the manifest, remove old checkpoints."""
        if self._place.rank != 0:
            return
        folder = self._place.folder / run_folder.step_folder(step)
        text = (folder / checkpoint_format.MANIFEST).read_text(encoding="utf-8")
        there = self._remote.sizes(folder.name)
        for name, entry in checkpoint_format.Manifest.from_json(text).files.items():
            if there.get(f"{folder.name}/{name}") != entry["bytes"]:
                raise OSError(f"{self._remote.url}/{folder.name}/{name} is missing or incomplete")
        self._remote.put(f"{folder.name}/{checkpoint_format.MANIFEST}", text.encode())
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Remove older checkpoints, also partly uploaded ones. Delete manifests first."""
        names = list(self._remote.sizes())
        done = [step for step in checkpoint_format.committed_objects(names) if step <= newest]
        settings = self._settings
        kept = checkpoint_format.retained(done, settings.keep_last, settings.keep_every)
        stored = run_folder.steps(name.split("/")[0] for name in names)
        doomed = {step for step in stored if step <= newest}
        doomed -= kept | set(self._waiting)
        for step in sorted(doomed):
            folder = run_folder.step_folder(step)
            old = [name for name in names if name.startswith(f"{folder}/")]
            manifest = f"{folder}/{checkpoint_format.MANIFEST}"
            self._remote.delete([manifest] if manifest in old else [])
            self._remote.delete(name for name in old if name != manifest)
