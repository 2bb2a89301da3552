"""Test the lock of an output folder.

A second run in the same folder is refused. A run takes over the lock of a dead run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from blip_scale.engine import run_lock
from blip_scale.engine.run_lock import RunLock
from blip_scale.errors import RefusedInput

HOLDER = """
import sys, time
from pathlib import Path
from blip_scale.engine.run_lock import RunLock
RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def leave(folder: Path) -> None:
    """Make this process acquire the lock, but stop renewing it."""
    RunLock(folder)._ended.set()


def change(folder: Path, age_s: float = 0.0, **fields: Any) -> None:
    """Change fields of the lock, and set its last renewal to `age_s` seconds ago."""
    file = folder / "lock.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    os.utime(file, (time.time() - age_s, time.time() - age_s))


def test_a_second_run_is_refused_by_name_and_a_killed_one_is_not_in_the_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = hold(tmp_path)
    message = (
        rf"{tmp_path} belongs to a run that is still running \(process {process.pid} on .*\): give"
    )
    with pytest.raises(RefusedInput, match=message):
        RunLock(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["lock.json"]
    process.send_signal(signal.SIGKILL)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    lock = RunLock(tmp_path)
    process.wait()
    assert "took over the lock of a run that ended" in caplog.text
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())
    RunLock(tmp_path).release()


def test_another_process_with_the_same_number_is_another_one(tmp_path: Path) -> None:
    leave(tmp_path)
    change(tmp_path, started=1.0)
    RunLock(tmp_path).release()


def test_a_silent_lock_of_another_machine_is_stale(tmp_path: Path) -> None:
    leave(tmp_path)
    change(tmp_path, age_s=run_lock.STALE_S + 1, host="elsewhere")
    RunLock(tmp_path).release()


def test_a_container_of_the_same_host_name_is_another_machine(tmp_path: Path) -> None:
    """The container's process ids are not valid here, so a renewed lock counts as alive."""
    process = hold(tmp_path)
    lock_text = (tmp_path / "lock.json").read_text()
    holder = json.loads(lock_text) | {"namespace": "pid:[1]", "pid": 999_999_999}
    assert run_lock._is_alive(holder) is None
    process.kill()
    process.wait()


def test_signs_of_life_of_another_machine_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run waits as long as a live run on the other machine needs to renew its lock."""
    monkeypatch.setattr(run_lock, "STALE_S", 3.0)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.5)
    alive = RunLock(tmp_path)
    monkeypatch.setattr(run_lock, "_is_alive", lambda holder: None)
    with pytest.raises(RefusedInput, match="is still running"):
        RunLock(tmp_path)
    alive.release()


def test_a_lock_that_falls_silent_is_taken_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE_S", 1.5)
    process = hold(tmp_path)
    process.kill()
    process.wait()
    change(tmp_path, host="elsewhere")
    began = time.monotonic()
    RunLock(tmp_path).release()
    assert 1 < time.monotonic() - began < 30


def test_a_restart_of_the_same_job_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM ends all processes of a job before it restarts the job on any node."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    leave(tmp_path)
    change(tmp_path, host="elsewhere")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path).release()


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_damaged_lock_is_judged_by_its_age(tmp_path: Path, text: str) -> None:
    file = tmp_path / "lock.json"
    file.write_text(text)
    os.utime(file, (time.time() - 3600,) * 2)
    RunLock(tmp_path).release()


def test_who_lost_its_lock_ends(tmp_path: Path) -> None:
    """A run that was suspended for long must end, because another run took over its folder."""
    process = hold(tmp_path)
    change(tmp_path, pid=1)
    assert process.wait(3 * run_lock.BEAT_S) == 1
