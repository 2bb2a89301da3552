"""TensorBoard: curves in reading order, a layout of charts, pictures, and hyperparameters."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from blip_scale import logs
from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.pictures import Panel
from blip_scale.storage import run_folder

_MARKDOWN = re.compile(r"[\\`*_\[\]|!]")
_HELD_OUT = 2
_PLACES = {
    "loss": 1,
    "reference": 1,
    "itm": 3,
    "nlvr2": 3,
    "visdial": 3,
    "speed": 4,
    "train": 5,
    "gradient_norm": 5,
    "momentum": 5,
    "queue": 5,
    "data": 6,
    "memory": 6,
    "communication": 6,
    "recipe": 7,
    "alarm": 9,
    "checkpoint": 9,
}
"""Group of a metric (`loss` of `loss/itc`) -> its place in TensorBoard. A group that is not listed
is a held-out set."""

_LAYOUT = {
    "1 losses": {"losses": ["1_loss/"], "ITM accuracy": ["3_itm/"]},
    "2 held-out retrieval": {
        "image to text": ["2_.*image_to_text_r"],
        "text to image": ["2_.*text_to_image_r"],
    },
    "3 speed": {
        "pairs per second": ["4_speed/samples_per_s"],
        "model FLOPs utilization": ["4_speed/mfu"],
        "shares of a step": ["4_speed/data_wait_share", "6_communication/blocked_share"],
    },
    "4 training": {
        "learning rate": ["5_train/learning_rate"],
        "gradient norms": ["5_gradient_norm/"],
        "temperature": ["5_train/temperature"],
    },
    "9 alarms and checkpoint pauses": {"alarms": ["9_alarm/"], "pauses": ["9_checkpoint/"]},
}
"""Category of the Custom Scalars tab -> chart -> regular expressions for the beginnings of tags."""

_SETTINGS = (
    "task", "seed", "model.vision.name", "model.vision.image_size", "objective.momentum",
    "objective.queue_size", "objective.alpha", "objective.itm", "data.min_crop_scale",
    "optimizer.schedule", "optimizer.peak_lr", "optimizer.min_lr", "optimizer.warmup_steps",
    "optimizer.lr_decay", "optimizer.weight_decay", "optimizer.gradient_clip",
    "train.global_batch_size", "train.micro_batch_size", "train.epochs", "train.precision",
)  # fmt: skip
"""Settings in the HParams tab, by their dotted names in the recipe."""
_FIELDS = {
    api_pb2.DATA_TYPE_BOOL: "bool_value",
    api_pb2.DATA_TYPE_STRING: "string_value",
    api_pb2.DATA_TYPE_FLOAT64: "number_value",
}
"""Type of a setting -> field of a protobuf value."""


class TensorBoardLogger:
    """Writes event files to tensorboard/ in the run folder.

    TensorBoard sorts groups of curves by name, so each group gets its place in front: `loss/itc`
    becomes `1_loss/itc`, and alarms come last (`9_alarm/...`).
    """

    def __init__(self, run: LoggedRun) -> None:
        """Open an event file. TensorBoard hides points after the step from which the run resumes.

        Raises:
            OSError: the folder can't be written.
        """
        folder = run.output_dir / run_folder.TENSORBOARD
        self._writer = SummaryWriter(str(folder), purge_step=run.start_step + 1, flush_secs=30)
        self._start_step = run.start_step
        self._settings = chosen_settings(run.settings)
        self._tags: set[str] = set()
        layout = {}
        for category, charts in _LAYOUT.items():
            layout[category] = {chart: ["Multiline", tags] for chart, tags in charts.items()}
        if run.settings.get("log", {}).get("reference"):
            for name in ("itc", "itm", "lm"):
                tags = [f"1_loss/{name}", f"1_reference/{name}"]
                layout["1 losses"][f"{name} and reference"] = ["Multiline", tags]
        self._writer.add_custom_scalars(layout)
        if self._settings:
            session = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
            for name, value in self._settings.items():
                field = _FIELDS[_type_of(value)]
                setattr(session.hparams[name], field, value)
            self._add_hparams(metadata.SESSION_START_INFO_TAG, session_start_info=session)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to every curve. `samples` and `time` are not curves."""
        for name, value in metrics.items():
            if "/" in name:
                self._tags.add(tag(name))
                self._writer.add_scalar(tag(name), value, step)
        self._writer.flush()  # a killed run must not leave a gap before its checkpoint

    def pictures(self, step: int, name: str, sheet: Tensor, panels: Sequence[Panel]) -> None:
        """Write the sheet as an image and its texts as a table."""
        rows = [f"| {_cell(panel.caption)} | {_cell(panel.truth)} |" for panel in panels]
        table = "\n".join(["| generated | true |", "|---|---|", *rows])
        self._writer.add_image(tag(name), sheet, step)
        self._writer.add_text(tag(name), table, step)
        self._writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Write the text as a code block."""
        verbatim = "\n".join(f"    {logs.printable(line)}" for line in text.splitlines())
        self._writer.add_text(tag(name), verbatim, step)

    def close(self, finished: bool) -> None:
        """Close the event file. A finished run names the metrics of the HParams tab: its losses
        and held-out figures. TensorBoard keeps the first such list that it reads, so a run that
        continues later writes none, and the tab offers all curves until then."""
        if finished and self._settings:
            shown = sorted(name for name in self._tags if name.startswith(("1_", "2_")))
            metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in shown]
            settings = [
                api_pb2.HParamInfo(name=name, type=_type_of(value))
                for name, value in self._settings.items()
            ]
            experiment = api_pb2.Experiment(hparam_infos=settings, metric_infos=metrics)
            self._add_hparams(metadata.EXPERIMENT_TAG, experiment=experiment)
            end = plugin_data_pb2.SessionEndInfo(
                status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time()
            )
            self._add_hparams(metadata.SESSION_END_INFO_TAG, session_end_info=end)
        self._writer.close()

    def _add_hparams(self, name: str, **content: Any) -> None:
        """Add a record of the HParams tab. TensorBoard's functions for this need TensorFlow."""
        data = plugin_data_pb2.HParamsPluginData(**content)
        described = metadata.create_summary_metadata(data)
        value = Summary.Value(tag=name, metadata=described, tensor=metadata.NULL_TENSOR)
        self._writer._get_file_writer().add_summary(Summary(value=[value]), self._start_step)


def tag(name: str) -> str:
    """Tag of a metric in TensorBoard: `loss/itc` -> `1_loss/itc`."""
    group = name.partition("/")[0]
    return f"{_PLACES.get(group, _HELD_OUT)}_{name}"


def chosen_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for the HParams tab by dotted name, without null values."""
    chosen = {}
    for name in _SETTINGS:
        value: Any = recipe
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str | int | float):
            chosen[name] = value
    return chosen


def _type_of(value: object) -> int:
    """Return the TensorBoard type of a setting."""
    if isinstance(value, bool):
        return int(api_pb2.DATA_TYPE_BOOL)
    return int(api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64)


def _cell(text: str) -> str:
    """A text for a cell of a Markdown table that TensorBoard shows as it is, neither a link nor
    HTML."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(logs.printable(text), quote=False))
