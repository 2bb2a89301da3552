"""Decisions of slurm/requeue.py on real folders. tests/cluster covers a real SLURM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from blip_scale.config import exit_codes


@pytest.fixture
def requeue(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, in the environment of a job."""
    spec = importlib.util.spec_from_file_location("requeue", repo / "slurm" / "requeue.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "requeue", tool)  # dataclasses look there
    spec.loader.exec_module(tool)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return tool


def test_it_needs_no_installed_package(repo: Path) -> None:
    """A batch script may call it with a Python that has no torch."""
    tool = [sys.executable, "-I", "-S", str(repo / "slurm" / "requeue.py"), "--help"]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Requeue a job" in done.stdout


def commit(output_dir: Path, step: int) -> None:
    (output_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def test_failures_count_until_a_newer_checkpoint(requeue: ModuleType, tmp_path: Path) -> None:
    """Stops on request neither count nor pardon; a newer checkpoint does, and so does a new job."""
    counts = []
    for code, step in ((1, 4), (137, 4), (75, 4), (1, 4), (1, 8), (75, 12), (1, 12), (143, 12)):
        if step > requeue.newest_checkpoint(tmp_path):
            commit(tmp_path, step)
        attempts = requeue.note_attempt(tmp_path, code, 10)
        counts.append(requeue.failures_without_progress(attempts))
    assert counts == [1, 2, 2, 3, 1, 0, 1, 2]
    os.environ["SLURM_JOB_ID"] = "8"
    assert requeue.failures_without_progress(requeue.note_attempt(tmp_path, 1, 10)) == 1
    assert len(json.loads((tmp_path / "attempts.json").read_text())) == 9


@pytest.mark.parametrize("text", ["[]", "7", '{"time": "now", "checkpoint_step": null}', "{"])
def test_damaged_files_keep_no_job_from_going_on(
    requeue: ModuleType, tmp_path: Path, text: str
) -> None:
    commit(tmp_path, 4)
    for name in ("heartbeat.json", "attempts.json"):
        (tmp_path / name).write_text(text)
    (attempt,) = requeue.note_attempt(tmp_path, 1, 10)
    assert (attempt.checkpoint_step, attempt.failed) == (4, True)


def test_unfinished_saves_are_no_progress_and_elsewhere_counts(
    requeue: ModuleType, tmp_path: Path
) -> None:
    assert requeue.newest_checkpoint(tmp_path) == 0
    commit(tmp_path, 4)
    (tmp_path / "checkpoints" / "step_00000008.partial").mkdir()
    assert requeue.newest_checkpoint(tmp_path) == 4
    (tmp_path / "heartbeat.json").write_text('{"checkpoint_step": 12}')  # they lie in a bucket
    assert requeue.newest_checkpoint(tmp_path) == 12
    (tmp_path / "heartbeat.json").write_text('{"checkpo')
    assert requeue.newest_checkpoint(tmp_path) == 4


@pytest.mark.parametrize(
    ("heartbeat", "failed"),
    [
        (None, False),
        ({"phase": "starting", "age_s": 5}, False),
        ({"phase": "training", "age_s": 5}, True),
        ({"phase": "training", "age_s": 500}, False),  # of an earlier start
    ],
)
def test_refused_at_the_start_or_failed_in_the_run(
    requeue: ModuleType, tmp_path: Path, heartbeat: dict | None, failed: bool
) -> None:
    """A store that went away in the middle of a run exits with 2 as well: it is worth a retry."""
    if heartbeat is not None:
        content = {"phase": heartbeat["phase"], "time": time.time() - heartbeat["age_s"]}
        (tmp_path / "heartbeat.json").write_text(json.dumps(content))
    assert requeue.note_attempt(tmp_path, exit_codes.REFUSED, 60)[-1].failed is failed
