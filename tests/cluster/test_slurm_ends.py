"""Ends of a job that must not be requeued: repeated failures, refused input, a user's stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quick_rank
import slurm_runs
import tiny_runs
from slurm_cluster import SlurmCluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


def test_a_job_that_fails_at_the_same_step_stops_with_a_report(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    """A job with three ranks, two on one node, is started three times and keeps its checkpoint.

    The second start is in the same allocation, the third in another.
    """
    job = slurm_runs.submit_quick(
        slurm, tmp_path, "fail_at=7",
        options=("--nodes=2", "--ntasks=3", "--ntasks-per-node=2"), FAILURE_WAIT="2",
    )  # fmt: skip
    slurm.wait(job.number, "FAILED", timeout_s=300)
    status = slurm.job(job.number)
    assert (status["Restarts"], status["ExitCode"]) == ("1", "137:0"), job.output()
    attempts = json.loads((job.run / "attempts.json").read_text())
    assert [attempt["checkpoint_step"] for attempt in attempts] == [5, 5, 5]
    starts = [(attempt["restart"], attempt["launch"]) for attempt in attempts]
    assert starts == [(0, 0), (0, 1), (1, 0)]
    report = (job.run / "failure_report.txt").read_text()
    assert "failed 3 times without a checkpoint newer than step 5" in report
    assert f"RuntimeError: {quick_rank.MESSAGE}" in report
    assert report.count("n[1-2]; rank 1 on n1: Exited with exit code 1") == 3
    assert status["StdOut"] in report
    assert "not requeued: failed 3 times" in job.output()
    assert "requeued: failure 2 of 3: the last try" in job.output()


def test_a_refused_recipe_is_not_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Both ranks refuse the initial weights, a moment apart; only one of them reports it."""
    tiny_runs.make_recipe(tmp_path)
    job = slurm_runs.submit(slurm, "finetune.sh", tmp_path, INIT="not/there.pth")
    slurm.wait(job.number, "FAILED")
    status = slurm.job(job.number)
    assert (status["Restarts"], status["ExitCode"]) == ("0", "2:0"), job.output()
    assert "not requeued: the input was refused" in job.output()
    assert "model.checkpoint" in (job.run / "logs" / "task_0.log").read_text()
    assert not (job.run / "failure_report.txt").exists()


def test_stopped_by_a_person_a_job_stays_stopped(slurm: SlurmCluster, tmp_path: Path) -> None:
    """`scancel` saves and ends the job, as does SIGUSR1 with Requeue=0."""
    tiny_runs.make_recipe(tmp_path, train={"max_steps": 100_000})
    job = slurm_runs.submit(slurm, "pretrain_14M.sh", tmp_path, options=("--nodes=1",))
    job.wait_for_step(3)
    slurm.run("scancel", job.number)
    slurm.wait(job.number, "CANCELLED")
    wait_for(lambda: slurm.idle_nodes() == 2, "the end of the ranks")
    saved = job.newest_checkpoint()
    assert saved >= 3 and slurm.job(job.number)["Restarts"] == "0"

    (tmp_path / "quick").mkdir()
    quick = slurm_runs.submit_quick(slurm, tmp_path / "quick")
    wait_for(lambda: quick.newest_checkpoint() >= quick_rank.EVERY_STEPS, "a checkpoint")
    slurm.run("scontrol", "update", f"JobId={quick.number}", "Requeue=0")
    slurm.run("scancel", "--batch", "--signal=USR1", quick.number)
    quick.wait_for_line("not requeued: stopped on request, and the job has Requeue=0")
