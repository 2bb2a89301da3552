"""The heartbeat by what its file says, and its timer by processes that it ends."""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blip_scale.engine.watching import heartbeat as module
from blip_scale.engine.watching.heartbeat import Heartbeat


def make(run: Path, rank: int = 0, stall_timeout_s: float = 0) -> Heartbeat:
    (run / "logs").mkdir(exist_ok=True)
    return Heartbeat(run, rank, stall_timeout_s)


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
    assert read(tmp_path)["step"] == 4  # about once a second
    now[0] += 0.6
    beating.beat("training", step=6, samples_per_s=12.5)
    assert {read(tmp_path)[name] for name in ("step", "samples_per_s", "time")} == {6, 12.5, 1001.1}
    beating.beat("saving")  # a new phase is said at once
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


def hang_in_python() -> None:
    threading.Event().wait()


def hang_in_c_with_the_interpreter_locked() -> None:
    ctypes.PyDLL(None).sleep(60)


def stall(run: Path, timeout_s: float, hang: Callable[[], None]) -> None:
    """What a rank does that beats for a while and then hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest has a use for it, a rank has none
    beating = make(run, 3, timeout_s)
    for _ in range(8):
        time.sleep(timeout_s / 4)
        beating.beat("training")
    (run / "hangs").touch()
    hang()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Runs `stall` in a process of its own."""
    started = []

    def start(*arguments: Any) -> Any:
        process = multiprocessing.get_context("fork").Process(target=stall, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("hang", [hang_in_python, hang_in_c_with_the_interpreter_locked])
def test_a_process_that_stalls_ends_with_its_stacks_in_the_log(
    tmp_path: Path,
    start: Callable[..., Any],
    hang: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    process = start(tmp_path, 1.0, hang)
    process.join(30)
    assert process.exitcode == 1
    assert (tmp_path / "hangs").exists()  # beats wound it up: it did not go off before
    log = (tmp_path / "logs" / "rank_3.log").read_text()
    assert "Timeout (0:00:01.5" in log
    assert f"in {hang.__name__}" in log and "in stall" in log
    if hang is hang_in_python:  # else nobody can speak
        printed = capfd.readouterr().err
        assert "rank 3 stalled: no progress for 1 s while training; ends now, stacks in" in printed


def test_a_log_on_a_dead_disk_does_not_keep_it_alive(
    tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody empties takes the stacks as little as a mount whose server is gone."""
    monkeypatch.setattr(module, "_GRACE_S", 1.0)
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "rank_3.log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(log, os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.close(writer)
    process = start(tmp_path, 1.0, hang_in_python)
    process.join(30)
    assert process.exitcode == -signal.SIGALRM
    os.close(reader)


def test_the_timer_can_be_stopped_and_be_off(tmp_path: Path, start: Callable[..., Any]) -> None:
    beating = make(tmp_path, 0, 0.5)
    beating.close()
    process = start(tmp_path, 0, lambda: time.sleep(1.5))
    process.join(30)
    assert process.exitcode == 0  # and this process is here as well, 1.5 s later
