"""Weights & Biases. Its own variables apply: WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY, and
WANDB_MODE=offline, which keeps everything in the run folder for `wandb sync`."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.pictures import Panel
from blip_scale.storage import files, run_folder

PROJECT = "blip_scale"
_STEP = "step"
_INIT_TIMEOUT_S = 60.0
_FINISH_TIMEOUT_S = 120.0


class WandbLogger:
    """Logs to one W&B run. Its id is stored in the run folder, so a restart continues it.

    W&B cannot delete points. Each point has its step, and all charts use the step as x axis. Points
    that a resumed run computes again are therefore drawn over those of the previous start.
    """

    def __init__(self, run: LoggedRun) -> None:
        """Open the W&B run.

        Raises:
            RuntimeError: there is no login or no network. It is not tried again, since an attempt
                takes up to a minute.
        """
        import wandb  # optional dependency

        self._wandb = wandb
        is_online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
        if is_online and not wandb.login(prompt=False):  # `init` would wait for an answer
            raise RuntimeError("no login: run `wandb login` first, or set WANDB_MODE=offline")
        (run.output_dir / run_folder.WANDB).mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", run.output_dir.resolve().name),
                id=_run_id(run),
                resume="allow",
                dir=str(run.output_dir),
                config=dict(run.settings),
                settings=wandb.Settings(console="off", silent=True, init_timeout=_INIT_TIMEOUT_S),
            )
            self._run.define_metric(_STEP)
            self._run.define_metric("*", step_metric=_STEP)
        except OSError as error:
            raise RuntimeError(f"W&B can't be opened: {error}") from error

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand a point to W&B's own process, which sends it when it can."""
        self._run.log({_STEP: step, **metrics})

    def pictures(self, step: int, name: str, sheet: Tensor, panels: Sequence[Panel]) -> None:
        """Log the sheet as an image and its texts as a table. W&B shows cells as plain text."""
        table = self._wandb.Table(columns=["generated", "true"])
        for panel in panels:
            table.add_data(panel.caption, panel.truth)
        image = self._wandb.Image(sheet.permute(1, 2, 0).cpu().numpy())
        shown: dict[str, Any] = {f"{name}/pictures": image, f"{name}/captions": table}
        self._run.log({_STEP: step, **shown})

    def text(self, step: int, name: str, text: str) -> None:
        """Store the text in the config of the W&B run."""
        self._run.config.update({f"{name}_text": text}, allow_val_change=True)

    def close(self, finished: bool) -> None:
        """Send what is left; W&B shows a run that was not finished as failed.

        Raises:
            RuntimeError: not everything was sent in time. Waiting on would look like a stall.
        """
        code = 0 if finished else 1
        sending = threading.Thread(target=self._run.finish, args=(code,), daemon=True)
        sending.start()
        sending.join(_FINISH_TIMEOUT_S)
        if sending.is_alive():
            raise RuntimeError("not everything was sent; `wandb sync` sends the rest")


def _run_id(run: LoggedRun) -> str:
    """Return the id of the W&B run. A run that begins at step 0 gets a new id."""
    file = run.output_dir / run_folder.WANDB / run_folder.WANDB_ID
    if run.start_step and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:12]
    files.write_whole(file, run_id + "\n")
    return run_id
