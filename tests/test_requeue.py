"""Decisions of slurm/requeue.py and run_ranks.py. tests/cluster covers a real SLURM."""

from __future__ import annotations

import importlib
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
def run_ranks(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, in the environment of a job."""
    monkeypatch.syspath_prepend(str(repo / "slurm"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return importlib.import_module("run_ranks")


@pytest.fixture
def requeue(run_ranks: ModuleType) -> ModuleType:
    """The module that decides."""
    return run_ranks.requeue


def test_it_needs_no_installed_package(repo: Path) -> None:
    """A batch script may call it with a Python that has no torch."""
    tool = [sys.executable, "-I", "-S", str(repo / "slurm" / "run_ranks.py"), "--help"]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "restart them when they fail" in done.stdout


def test_what_follows_an_attempt(requeue: ModuleType, tmp_path: Path) -> None:
    """A failure is followed by a restart here, then by the last try elsewhere, then by a report."""
    job = {"Requeue": "1", "EndTime": "Unknown"}
    stays = {"Requeue": "0", "EndTime": "Unknown"}

    def follows(code: int, job: dict[str, str]) -> str:
        attempts = requeue.note_attempt(tmp_path, code, 10, nodes="n[1-2]", cause="rank 1 on n2")
        return requeue.decide(attempts, job, limit=3)[0].value

    assert [follows(137, job) for _ in range(3)] == ["restart", "requeue", "stop"]
    report = requeue.write_report(requeue.note_attempt(tmp_path, 1, 10), tmp_path, job)
    assert report.read_text().count("n[1-2]; rank 1 on n2") == 3
    commit(tmp_path, 4)
    assert [follows(137, stays) for _ in range(3)] == ["restart", "restart", "stop"]
    commit(tmp_path, 8)
    assert (follows(75, job), follows(75, stays)) == ("requeue", "stop")
    assert follows(2, job) == "stop"
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 400))
    assert follows(1, {"EndTime": soon}) == "requeue"
    commit(tmp_path, 12)
    assert follows(1, {"Reason": "TimeLimit"}) == "requeue"
    commit(tmp_path, 16)
    attempts = requeue.note_attempt(tmp_path, 137, 10)
    decision, reason = requeue.decide(attempts, job, limit=3, is_stop_requested=True)
    assert (decision.value, reason) == ("requeue", "stopped on request")


def test_spare_nodes_replace_those_that_failed(run_ranks: ModuleType) -> None:
    allocation = run_ranks.Allocation(["a", "b", "c", "d", "e"], needed=4, least=2)
    assert allocation.select(allocation.nodes) == ["a", "b", "c", "d"]
    allocation.failures["b"] += 1
    assert allocation.select(allocation.nodes) == ["a", "c", "d", "e"]
    assert allocation.select(["a", "b", "c", "d"]) == ["a", "b", "c", "d"]
    assert allocation.select(["b", "c", "e"]) == ["c", "e"], "three nodes do not divide the batch"
    assert allocation.select(["c"]) == []


def test_a_hang_is_blamed_on_the_rank_that_others_wait_for(
    run_ranks: ModuleType, tmp_path: Path
) -> None:
    """The rank that srun saw ending first only waited."""
    suspect = {"rank": 1, "node": "n2", "reason": "gives no sign of life"}
    entry = {"rank": 0, "node": "n1", "phase": "training", "limit_s": 180.0, "suspects": [suspect]}
    old = {**entry, "time": 50.0, "suspects": [{**suspect, "node": "n9"}]}
    lines = [json.dumps(old), '{"time": 1', json.dumps({**entry, "time": 150.0})]
    (tmp_path / "stalls.jsonl").write_text("\n".join(lines))
    ending = run_ranks.Ending(1, 10.0, "n1", "rank 0 on n1: Exited with exit code 1")
    run_ranks.blame_hanging_rank(ending, tmp_path, since=100.0)
    assert ending.node == "n2"
    reason = "rank 1 on n2 gives no sign of life; no progress for 180 s while training"
    assert ending.cause == reason


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


def test_the_report_has_the_stacks_of_a_hang(requeue: ModuleType, tmp_path: Path) -> None:
    stall = "rank 0 on n1 stalled: no progress for 180 s while training, 7 steps done"
    lines = ["INFO step 7", stall, "Timeout (0:03:02)!", *(f"  File {n}" for n in range(40))]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").write_text("\n".join(lines))
    report = requeue.write_report(requeue.note_attempt(tmp_path, 1, 60), tmp_path, {}).read_text()
    assert stall in report and "File 39" in report and "INFO step 7" not in report


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
