"""Test the record of a run's wall time, with a clock that the test controls."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from blip_scale.engine.watching import goodput as module
from blip_scale.engine.watching.goodput import Goodput


class Clock:
    """Fake wall clock, with the creation time of the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.created = 1_000_000.0
        monkeypatch.setattr(module.time, "time", lambda: self.now)
        monkeypatch.setattr(module.psutil.Process, "create_time", lambda process: self.created)

    def start_process(self, down_s: float) -> None:
        self.now += down_s
        self.created = self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def spend(goodput: Goodput, clock: Clock, **seconds: float) -> None:
    """Let time pass, and record its use."""
    for use, duration in seconds.items():
        clock.now += duration
        goodput.spend(use)  # type: ignore[arg-type]


def content(run: Path) -> dict[str, Any]:
    return json.loads((run / "goodput.json").read_text())


def test_a_run_that_is_killed_twice(tmp_path: Path, clock: Clock) -> None:
    """Each step in the checkpoint counts once. The time while the run is down also counts."""
    goodput = Goodput(tmp_path, True)
    goodput.resume({})
    spend(goodput, clock, start=20, steps=100)
    saved = goodput.record()
    spend(goodput, clock, saving=2, steps=50)  # lost, because the process is killed

    clock.start_process(down_s=30)
    goodput = Goodput(tmp_path, True)
    clock.now += 4
    goodput.resume(saved)
    spend(goodput, clock, start=6, steps=60)
    saved = goodput.record()
    spend(goodput, clock, evaluation=8, other=1)

    clock.start_process(down_s=0)
    goodput = Goodput(tmp_path, True)
    goodput.resume(saved)
    spend(goodput, clock, repeated=5, steps=40)
    expected = {
        "steps": 200, "start": 30, "evaluation": 8, "saving": 2, "repeated": 55, "other": 1,
        "down": 30,
    }  # fmt: skip
    assert goodput.figures()["seconds"] == expected
    assert goodput.figures()["share"] == pytest.approx(200 / sum(expected.values()))
    assert content(tmp_path)["seconds"] == expected
    assert content(tmp_path)["first_start"] == 1_000_000
    assert goodput.curves()["speed/goodput"] == pytest.approx(200 / 326)
    assert math.fsum(goodput.curves().values()) == pytest.approx(1)


def test_a_checkpoint_before_the_last_one_counts_its_own_steps(
    tmp_path: Path, clock: Clock
) -> None:
    goodput = Goodput(tmp_path, True)
    spend(goodput, clock, steps=10)
    older = goodput.record()
    spend(goodput, clock, steps=30)
    goodput = Goodput(tmp_path, True)
    goodput.resume(older)
    assert goodput.figures()["seconds"]["steps"] == 10
    assert goodput.figures()["seconds"]["repeated"] == 30


def test_a_checkpoint_may_be_newer_than_the_file(tmp_path: Path, clock: Clock) -> None:
    """Steps and pauses in the last second before a kill count if they are in a checkpoint."""
    goodput = Goodput(tmp_path, True)
    spend(goodput, clock, start=20, steps=0.4, saving=0.1)
    saved = goodput.record()
    assert content(tmp_path)["seconds"]["steps"] == 0, "the file is written once a second"
    clock.start_process(down_s=10)
    goodput = Goodput(tmp_path, True)
    goodput.resume(saved)
    spend(goodput, clock, start=5)
    seconds = content(tmp_path)["seconds"]
    assert seconds["steps"] == pytest.approx(0.4) and seconds["saving"] == pytest.approx(0.1)
    assert (seconds["repeated"], seconds["down"]) == (0, pytest.approx(10))


@pytest.mark.parametrize("text", ["", "[]", '{"first_start": 1}', "[" * 100_000])
def test_a_record_that_is_lost_comes_from_the_checkpoint(
    tmp_path: Path, clock: Clock, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    goodput = Goodput(tmp_path, True)
    spend(goodput, clock, start=20, steps=70)
    saved = goodput.record()
    (tmp_path / "goodput.json").write_text(text)
    clock.start_process(down_s=10)
    goodput = Goodput(tmp_path, True)
    assert "goodput starts again from zero" in caplog.text
    goodput.resume(saved)
    spend(goodput, clock, start=5)
    seconds = content(tmp_path)["seconds"]
    assert (seconds["steps"], seconds["start"], seconds["down"]) == (70, 25, 10)


def test_a_clock_that_is_set_back_costs_nothing(tmp_path: Path, clock: Clock) -> None:
    goodput = Goodput(tmp_path, True)
    spend(goodput, clock, steps=100, other=-50)
    spend(goodput, clock, steps=10)
    seconds = goodput.figures()["seconds"]
    assert (seconds["steps"], seconds["other"], seconds["down"]) == (110, 0, 0)
    assert goodput.figures()["share"] == 1


def test_only_the_main_rank_writes_and_only_while_there_is_work(
    tmp_path: Path, clock: Clock
) -> None:
    other = Goodput(tmp_path, False)
    spend(other, clock, steps=5)
    assert other.figures() == other.curves() == other.record() == {}
    main = Goodput(tmp_path, True)
    main.stop()
    spend(main, clock, start=5)
    assert not (tmp_path / "goodput.json").exists()
