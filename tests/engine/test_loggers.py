"""Test the loggers of `log.to` by reading their output; TensorBoard's through its own server."""

from __future__ import annotations

import csv
import json
import logging
import math
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from blip_scale.config.recipe import Recipe
from blip_scale.engine.interrupts import StopRequested
from blip_scale.engine.watching.loggers import registry, tensorboard
from blip_scale.engine.watching.loggers.csv_file import CsvLogger
from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.loggers.tensorboard import TensorBoardLogger
from blip_scale.engine.watching.monitor import Monitor, Panel

HOSTILE = "<script>alert(1)</script> | [x](javascript:1)"


def monitor_of(folder: Path, loggers: list[str], start_step: int = 0) -> Monitor:
    settings = asdict(Recipe())
    return Monitor(LoggedRun(folder, start_step, settings), loggers, True, 100, 8)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_metrics_jsonl_is_written_without_any_logger(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, [])
    monitor.scalars(1, {"loss/itc": 2.0})
    monitor.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_csv_columns_never_move(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, ["csv"])
    monitor.scalars(1, {"loss/itc": 2.5, "loss/lm": math.nan})
    first = (tmp_path / "metrics.csv").read_text().splitlines()
    monitor.scalars(2, {"coco/r1": 0.25})
    monitor.scalars(3, {"loss/lm": 1.0, "loss/itc": 2.0})
    monitor.close()
    text = (tmp_path / "metrics.csv").read_text().splitlines()
    assert first[0] == "step,samples,time,loss/itc,loss/lm"
    assert text[0] == first[0] + ",coco/r1"
    assert text[1] == first[1] + ","
    rows = table(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["samples"] for row in rows] == ["8", "16", "24"]
    assert [row["loss/itc"] for row in rows] == ["2.5", "", "2.0"]
    assert [row["loss/lm"] for row in rows] == ["nan", "", "1.0"]
    assert [row["coco/r1"] for row in rows] == ["", "0.25", ""]


def test_csv_resumes_at_the_step_of_the_run(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, ["csv"])
    for step in range(1, 8):
        monitor.scalars(step, {"loss/itc": float(step)})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,64,17")  # the last row is incomplete after a kill
    resumed = monitor_of(tmp_path, ["csv"], start_step=5)
    for step in (6, 7):
        resumed.scalars(step, {"loss/itc": step + 0.5})
    resumed.close()
    losses = [(int(row["step"]), float(row["loss/itc"])) for row in table(tmp_path)]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.5), (7, 7.5)]


def test_csv_after_a_torn_row_goes_on_without_a_cut(tmp_path: Path) -> None:
    logger = CsvLogger(LoggedRun(tmp_path, 0))
    logger.scalars(1, {"a/b": 1.0})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,2.0")  # complete, except for the newline
    resumed = CsvLogger(LoggedRun(tmp_path, 2))
    resumed.scalars(3, {"a/b": 3.0})
    assert [row["step"] for row in table(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], r"log\.to: no logger 'tensorbord'; expected some of tensorboard, wandb"),
        (["csv", "csv"], r"log\.to: csv comes twice"),
    ],
)
def test_loggers_that_cannot_be_had_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.check(names)


def test_a_missing_package_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.LoggerKind("nowhere", "Nothing", "package_that_is_not_there")
    monkeypatch.setitem(registry.LOGGERS, "nothing", kind)
    with pytest.raises(ValueError, match="`pip install package_that_is_not_there`"):
        registry.check(["nothing"])


def test_the_command_ends_with_2_for_a_logger_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blip_scale.train", "--recipe", "demo", "log.to=[csw]"]
    command.append(f"output_dir={tmp_path / 'run'}")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "log.to: no logger 'csw'" in ended.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", tensorboard._SETTINGS)
def test_settings_of_the_hparams_tab_exist(name: str) -> None:
    value: Any = asdict(Recipe())
    for part in name.split("."):
        value = value[part]


def test_every_logger_is_there() -> None:
    for kind in registry.LOGGERS.values():
        module = __import__(kind.module, fromlist=[kind.name])
        assert callable(getattr(module, kind.name).scalars)


def test_a_failing_logger_costs_its_own_points_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: TensorBoardLogger, step: int, metrics: object) -> None:
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(TensorBoardLogger, "scalars", refuse)
    monitor = monitor_of(tmp_path, ["tensorboard", "csv"])
    for step in (1, 2):
        monitor.scalars(step, {"loss/itc": 1.0})
    monitor.pictures(2, "coco", [Panel(torch.zeros(3, 8, 8, dtype=torch.uint8), "a", "b")])
    monitor.close()
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len(warnings) == 1 and "tensorboard failed and is left out from step 1" in warnings[0]
    assert [row["step"] for row in table(tmp_path)] == ["1", "2"]


def test_a_request_to_stop_is_no_failure_of_a_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: CsvLogger, step: int, metrics: object) -> None:
        raise StopRequested("SIGTERM")

    monkeypatch.setattr(CsvLogger, "scalars", interrupted)
    with pytest.raises(StopRequested):
        monitor_of(tmp_path, ["csv"]).scalars(1, {"loss/itc": 1.0})


def whole_run(folder: Path) -> None:
    """Log the output of a pretraining run that is started twice."""
    for start_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        monitor = monitor_of(folder, ["tensorboard"], start_step)
        monitor.text("recipe", "task: pretrain")
        for step in steps:
            metrics = {
                "train/learning_rate": 1e-4, "loss/total": 9.0 - step, "loss/itc": 3.0,
                "loss/itm": 0.6, "loss/lm": 3.2, "itm/accuracy_match": 0.5,
                "alarm/itm_one_class": 0.0, "speed/samples_per_s": 10.0, "speed/mfu": 0.3,
                "checkpoint/pause_s": 0.1, "communication/blocked_share": 0.1,
            }  # fmt: skip
            monitor.scalars(step, metrics)
        monitor.scalars(step, {"coco/itc_image_to_text_r1": 0.1 * step})
        panel = Panel(torch.zeros(3, 8, 8, dtype=torch.uint8), HOSTILE, "a cat")
        monitor.pictures(step, "coco", [panel])
        if start_step:
            monitor.summary({})
        monitor.close()


def test_tags_begin_with_the_losses_and_end_with_alarms(tmp_path: Path) -> None:
    whole_run(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload()
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in sorted(events.Tags()["scalars"])))
    assert groups[:4] == ["1_loss", "2_coco", "3_itm", "4_speed"]
    assert groups[-2:] == ["9_alarm", "9_checkpoint"]
    (event,) = events.Tensors("custom_scalars__config__")[-1:]
    layout = layout_pb2.Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    titles = [category.title for category in layout.category]
    assert titles == sorted(titles)
    assert layout.category[0].chart[0].title == "losses"


class Server:
    """A TensorBoard on a free port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
        options = ["--port", str(self.port), "--load_fast", "false"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def ask(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as page:
            return json.load(page)

    def wait(self) -> None:
        until = time.monotonic() + 120
        while True:
            try:
                if self.ask("runs"):
                    return
            except OSError:
                assert self.process.poll() is None
            assert time.monotonic() < until, "TensorBoard does not answer"
            time.sleep(0.5)


def test_tensorboard_serves_layout_and_hyperparameters(tmp_path: Path) -> None:
    whole_run(tmp_path)
    server = Server(tmp_path)
    try:
        server.wait()
        (run,) = server.ask("runs")
        plugins = server.ask("plugins_listing")
        for name in ("scalars", "images", "text", "custom_scalars", "hparams", "timeseries"):
            assert plugins[name]["enabled"], name
        layout = server.ask("plugin/custom_scalars/layout")
        assert layout["category"][0]["title"] == "1 losses"
        titles = [chart["title"] for group in layout["category"] for chart in group["chart"]]
        assert len(titles) == len(set(titles)), "two starts make no chart twice"
        for category in layout["category"][:2]:
            curves = []
            for expression in category["chart"][0]["multiline"]["tag"]:
                points = server.ask("plugin/custom_scalars/scalars", run=run, tag=expression)
                assert points["regex_valid"]
                curves += points["tag_to_events"]
            expected = {
                "1 losses": ["1_loss/itc", "1_loss/itm", "1_loss/lm", "1_loss/total"],
                "2 held-out retrieval": ["2_coco/itc_image_to_text_r1"],
            }
            assert sorted(curves) == expected[category["title"]]
        experiment = server.ask("plugin/hparams/experiment", {"experimentName": ""})
        names = [info["name"] for info in experiment["hparamInfos"]]
        assert "optimizer.peak_lr" in names and "train.global_batch_size" in names
        metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
        assert metrics[0] == "1_loss/itc" and "2_coco/itc_image_to_text_r1" in metrics
        assert not [name for name in metrics if name.startswith("9_")]
        wanted = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "sliceSize": 9}
        wanted |= {"colParams": [{"hparam": "optimizer.peak_lr"}]}
        (group,) = server.ask("plugin/hparams/session_groups", wanted)["sessionGroups"]
        assert group["hparams"]["optimizer.peak_lr"] == pytest.approx(3e-4)
        last = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        assert last["1_loss/total"] == 5.0
        assert last["2_coco/itc_image_to_text_r1"] == pytest.approx(0.4)
    finally:
        server.process.terminate()
        server.process.wait(30)


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points, pictures and texts can be read from wandb's file. Needs the package wandb."""
    pytest.importorskip("wandb", reason="optional: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        monitor = monitor_of(tmp_path, ["wandb", "csv"], start_step)
        monitor.text("recipe", "task: pretrain")
        for step in steps:
            monitor.scalars(step, {"loss/itc": 1.0 / step})
        monitor.pictures(
            step, "coco", [Panel(torch.zeros(3, 8, 8, dtype=torch.uint8), HOSTILE, "a cat")]
        )
        monitor.close()
    records = [record for file in tmp_path.rglob("*.wandb") for record in wandb_records(file)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    (run_id,) = {run.run_id for run in runs}
    assert run_id == (tmp_path / "wandb" / "run_id.txt").read_text().strip()
    points = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): item.value_json
                for item in record.history.item
            }
            if "loss/itc" in row:
                points.append((int(row["step"]), float(row["loss/itc"])))
    assert sorted(points) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 1 / 3), (4, 0.25)]
    media = [file.name for file in tmp_path.rglob("media/**/*") if file.is_file()]
    assert any(name.endswith(".png") for name in media)
    assert any(name.endswith(".table.json") for name in media)


def test_weights_and_biases_without_a_login_never_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a terminal, `wandb.init` would wait for input, and block the run."""
    wandb = pytest.importorskip("wandb", reason="optional: pip install wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(wandb, "init", lambda **settings: pytest.fail("init was called"))
    monitor = monitor_of(tmp_path / "run", ["wandb"])
    monitor.scalars(1, {"loss/itc": 1.0})
    monitor.close()
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len(warnings) == 1 and "WANDB_MODE=offline" in warnings[0]


def wandb_records(file: Path) -> list[Any]:
    """Read the protobuf records of an offline run: a LevelDB log after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    records, position, partial = [], 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block is padding
            position += 32768 - position % 32768
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            records.append(record)
            partial = b""
    return records
