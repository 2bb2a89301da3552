"""Test the monitor by reading its output: event files, metrics.jsonl, the terminal."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from blip_scale.engine.watching import monitor as module
from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.loggers.tensorboard import tag
from blip_scale.engine.watching.monitor import (
    Alarm,
    Monitor,
    Panel,
    measure_peak_flops,
    peak_memory_gib,
)


def make(folder: Path, start_step: int = 0, **options: Any) -> Monitor:
    settings = {"is_main": True, "total_steps": 100, "samples_per_step": 8} | options
    return Monitor(LoggedRun(folder, start_step), ["tensorboard"], **settings)


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0}).Reload()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, round(point.value, 5)) for point in read(folder).Scalars(tag(name))]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


METRICS = {
    "loss/itc": 8.1234,
    "loss/itm": 0.6,
    "loss/total": 9.5,
    "train/learning_rate": 3e-4,
    "speed/mfu": 0.31,
}


def test_scalars_reach_tensorboard_and_the_file(tmp_path: Path) -> None:
    monitor = make(tmp_path)
    monitor.log(1, METRICS)
    monitor.scalars(2, {"retrieval/r1": 0.5, "loss/itc": math.nan})
    assert curve(tmp_path, "train/learning_rate") == [(1, 3e-4)]  # written before close()
    monitor.close()
    assert set(read(tmp_path).Tags()["scalars"]) == {*map(tag, METRICS), "2_retrieval/r1"}
    assert curve(tmp_path, "retrieval/r1") == [(2, 0.5)]
    first, second = rows(tmp_path)
    assert {name: first[name] for name in METRICS} == METRICS
    assert (first["step"], first["samples"]) == (1, 8)
    assert second["loss/itc"] is None  # JSON has no NaN


def test_one_aligned_line_a_point(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="blip_scale")
    monitor = make(tmp_path, total_steps=9000)
    for step in (1, 50, 8999):
        monitor.log(step, METRICS | {"loss/itc": 20.0 / step})
    lines = caplog.messages
    assert lines[1].startswith(
        "step   50/9000  itc  0.4000  itm  0.6000  total  9.5000  lr 3.00e-04"
    )
    assert "mfu  31%" in lines[1]
    assert len({line.index("eta") for line in lines}) == 1


def test_time_left_is_that_of_the_steps_so_far(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="blip_scale")
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monitor = make(tmp_path, start_step=40)  # steps of an earlier start take no time
    monitor.log(40, METRICS)
    now[0] += 100.0
    monitor.log(60, METRICS)
    assert caplog.messages[0].endswith("eta ?")
    assert caplog.messages[1].endswith("eta 0:03:20")


def test_curves_do_not_double_back_after_a_restart(tmp_path: Path) -> None:
    first = make(tmp_path)
    for step in range(1, 8):
        first.log(step, {"loss/total": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss/to')  # killed while writing
    del first  # killed: no close()
    second = make(tmp_path, start_step=5)
    for step in (6, 7, 8):
        second.log(step, {"loss/total": step + 0.5})
    second.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.5), (7, 7.5), (8, 8.5)]
    assert curve(tmp_path, "loss/total") == expected
    assert [(row["step"], row["loss/total"]) for row in rows(tmp_path)] == expected


def test_a_run_that_begins_anew_takes_everything_back(tmp_path: Path) -> None:
    first = make(tmp_path)
    first.log(3, {"loss/total": 1.0})
    second = make(tmp_path)
    second.log(4, {"loss/total": 2.0})
    second.close()
    assert curve(tmp_path, "loss/total") == [(4, 2.0)]
    assert len(rows(tmp_path)) == 1


def test_other_ranks_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "run"
    monitor = make(folder, is_main=False)
    monitor.advance(1)
    monitor.log(1, METRICS)
    monitor.scalars(1, METRICS)
    monitor.text("recipe", "x")
    monitor.pictures(1, "captions", [Panel(torch.zeros(3, 4, 4, dtype=torch.uint8), "a", "b")])
    monitor.summary({})
    monitor.close()
    assert not folder.exists()
    assert not caplog.messages


def test_alarm_sounds_once_an_episode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alarm = Alarm(
        "one_class", lambda metrics: metrics["loss/itm"] > 0.6, "one class only; lower the rate", 3
    )
    monitor = make(tmp_path, alarms=[alarm])
    sounded = []
    for step, loss in enumerate((0.7, 0.7, 0.5, 0.7, 0.7, 0.7, 0.7, 0.7, 0.5, 0.7, 0.7, 0.7)):
        caplog.clear()
        monitor.log(step, {"loss/itm": loss})
        for record in caplog.records:
            if record.levelno == logging.WARNING:
                sounded.append((step, record.getMessage()))
    assert sounded == [
        (5, "step 5: one class only; lower the rate"),
        (11, "step 11: one class only; lower the rate"),
    ]
    curve = [row["alarm/one_class"] for row in rows(tmp_path)]
    assert curve == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]


def test_an_alarm_lasts_as_long_as_its_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The alarm is logged repeatedly, survives a restart, and is in the summary."""
    alarm = Alarm("one_class", lambda metrics: metrics["loss/itm"] > 0.6, "one class only", 3)
    streaks: dict[str, int] = {}
    for start in (0, 20):
        monitor = make(tmp_path, start_step=start, alarms=[alarm], streaks=streaks)
        for step in range(start + 1, start + 21):
            monitor.log(step, {"loss/itm": 0.7})
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert warnings == [
        "step 3: one class only",
        "step 23: one class only (for 23 logged points)",
    ]
    assert monitor.lasting_alarms() == {"one_class": {"message": "one class only", "points": 40}}
    monitor.log(41, {"loss/itm": 0.5})
    assert monitor.lasting_alarms() == {}


def test_text_is_shown_as_it_stands(tmp_path: Path) -> None:
    monitor = make(tmp_path)
    monitor.text("recipe", "train:\n  epochs: 2")
    monitor.close()
    (event,) = read(tmp_path).Tensors("7_recipe/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "    train:\n      epochs: 2"


def test_pictures_show_images_and_captions(tmp_path: Path) -> None:
    monitor = make(tmp_path)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    panels = [
        Panel(
            torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 20, 20),
            "a generated caption that takes " * 8,
            "a | b" if index == 0 else "x" * 80,
        )
        for index, colour in enumerate(colours)
    ]
    monitor.pictures(7, "captions", panels)
    monitor.pictures(7, "nothing", [])
    monitor.close()
    events = read(tmp_path)
    assert events.Tags()["images"] == ["2_captions"]
    (event,) = events.Images("2_captions")
    sheet = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
    shown_colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert set(colours) <= shown_colours
    row_height = sheet.height // 3  # two per row, so the fifth image is in the third row
    assert sheet.getpixel((100, 100)) == colours[0]
    assert sheet.getpixel((100, 100 + 2 * row_height)) == colours[4]
    words = sheet.crop((0, 240, 234, row_height))
    assert words.getextrema()[0][0] < 60  # there is black text below the image
    (table,) = events.Tensors("2_captions/text_summary")
    assert r"| a \| b |" in table.tensor_proto.string_val[0].decode()


def test_summary_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = make(tmp_path)
    monitor.summary({"losses": {"itc": 1.0, "itm": math.inf}, "captions": ["größer"]})
    file = tmp_path / "summary.json"
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "losses": {"itc": 1.0, "itm": None},
        "captions": ["größer"],
    }

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="the disk is full"):
        monitor.summary({"losses": {}})
    assert json.loads(file.read_text(encoding="utf-8"))["captions"] == ["größer"]


def test_a_full_disk_costs_points_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = make(tmp_path)
    monitor.log(1, METRICS)
    add_scalar = SummaryWriter.add_scalar

    def no_room(self: SummaryWriter, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", no_room)
    for step in (2, 3):
        monitor.log(step, METRICS)
    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    monitor.log(4, METRICS)
    monitor.close()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert [step for step, _ in curve(tmp_path, "loss/itc")] == [1, 4]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monitor = make(tmp_path, start_step=40)
    monitor.log(41, METRICS | {"speed/samples_per_s": 12.34})
    monitor.advance(50)
    monitor.close()
    last = terminal.getvalue().splitlines()[-1].split("\r")[-1]
    assert "50/100" in last
    assert "itc=8.123" in last
    assert "samples/s=12.3" in last


def test_silence_is_the_main_rank_s_and_ends_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="blip_scale")
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monitor, other = make(tmp_path), make(tmp_path / "other", is_main=False)
    clock[0] += 29
    assert not monitor.is_silent(30)
    clock[0] += 1
    assert monitor.is_silent(30) and not monitor.is_silent(None) and not other.is_silent(30)
    monitor.line(2, METRICS)
    assert not monitor.is_silent(30)
    assert "itc  8.1234" in caplog.messages[0]
    assert not (tmp_path / "metrics.jsonl").exists(), "a line is no point"
    clock[0] += 30
    monitor.log(3, METRICS)
    assert not monitor.is_silent(30), "a point has a line"


def test_measures_of_the_machine() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e8 < measure_peak_flops(cpu, dtype) < 1e14
    before = peak_memory_gib(cpu)
    assert 0.05 < before < 2000
    torch.ones(60, 1024, 1024)  # 240 MiB
    assert peak_memory_gib(cpu) >= before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_of_a_gpu() -> None:
    device = torch.device("cuda")
    assert 1e12 < measure_peak_flops(device, torch.bfloat16) < 1e16
    torch.ones(256, 1024, 1024, device=device)  # 1 GiB
    assert 1.0 <= peak_memory_gib(device) < 1000
