"""Test the heartbeat by the content of its file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from blip_scale.config.recipe import HangLimitsRecipe
from blip_scale.engine.watching import heartbeat as module
from blip_scale.engine.watching.hang_limits import HangLimits
from blip_scale.engine.watching.heartbeat import Heartbeat

NO_LIMITS = HangLimits(HangLimitsRecipe(0, 0, 0, 0))


def make(run: Path, rank: int = 0) -> Heartbeat:
    (run / "logs").mkdir(exist_ok=True)
    return Heartbeat(run, rank, NO_LIMITS)


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "heartbeat.json").read_text())


def test_the_file_says_where_the_run_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    beating = make(tmp_path)
    assert read(tmp_path) == {
        "step": 0, "total_steps": 0, "checkpoint_step": 0, "samples_per_s": 0.0, "time": 1000.0,
        "phase": "starting", "job_id": "77", "restarts": 0,
    }  # fmt: skip
    beating.beat("training", step=4, total_steps=9, checkpoint_step=4)
    now[0] += 0.5
    beating.beat("training", step=5, samples_per_s=12.5)
    assert read(tmp_path)["step"] == 4  # the file is written about once a second
    now[0] += 0.6
    beating.beat("training", step=6, samples_per_s=12.5)
    assert {read(tmp_path)[name] for name in ("step", "samples_per_s", "time")} == {6, 12.5, 1001.1}
    beating.beat("saving")  # a new phase is written at once
    assert (read(tmp_path)["phase"], read(tmp_path)["step"]) == ("saving", 6)
    now[0] -= 3600  # the clock was set back
    beating.beat("saving", step=7)
    assert read(tmp_path)["step"] == 7


def test_a_restart_goes_on_from_what_the_file_says(tmp_path: Path) -> None:
    make(tmp_path).beat("training", step=6, total_steps=9, checkpoint_step=4)
    again = make(tmp_path)
    assert again.before["step"] == 6
    content = read(tmp_path)
    assert (content["phase"], content["restarts"], content["job_id"]) == ("starting", 1, None)
    assert (content["step"], content["total_steps"], content["checkpoint_step"]) == (6, 9, 4)
    make(tmp_path)
    assert read(tmp_path)["restarts"] == 2
    (tmp_path / "heartbeat.json").write_text('{"step": 6, "tot')
    assert make(tmp_path).before == {}
    assert read(tmp_path)["restarts"] == 0


@pytest.mark.parametrize("text", ["[]", "7", "[" * 100_000, '{"step": Infinity}', '{"step": []}'])
def test_a_damaged_file_is_a_first_start(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    (tmp_path / "heartbeat.json").write_text(text)
    assert make(tmp_path).before == {}
    assert read(tmp_path)["restarts"] == 0


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    make(tmp_path, rank=1).beat("training", step=1)
    assert not (tmp_path / "heartbeat.json").exists()


def test_a_disk_that_fails_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "heartbeat.json").mkdir()  # cannot be replaced by a file
    beating = make(tmp_path)
    beating.beat("training", step=1)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "heartbeat" in caplog.messages[0]
    (tmp_path / "heartbeat.json").rmdir()
    beating.beat("saving")
    assert read(tmp_path)["phase"] == "saving"
