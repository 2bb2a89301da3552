"""Ends of a job that must not be requeued: repeated failures, refused input, a user's stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import slurm_runs
import tiny_runs
import train_failing
from slurm_cluster import SlurmCluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


def test_a_job_that_fails_at_the_same_step_stops_with_a_report(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    """A job with three ranks, two on one node, is started three times and keeps its checkpoint.

    The second start is in the same allocation, the third in another.
    """
    tiny_runs.make_recipe(tmp_path, train={"max_steps": 12, "global_batch_size": 12})
    job = slurm_runs.submit(
        slurm, "pretrain_14M.sh", tmp_path, "checkpoint.every_steps=4",
        options=("--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--gpus-per-node=2"),
        TRAIN=f"{sys.executable} {train_failing.__file__}",
    )  # fmt: skip
    slurm.wait(job.number, "FAILED", timeout_s=900)
    status = slurm.job(job.number)
    assert (status["Restarts"], status["ExitCode"]) == ("1", "1:0"), job.output()
    attempts = json.loads((job.run / "attempts.json").read_text())
    assert [attempt["checkpoint_step"] for attempt in attempts] == [4, 4, 4]
    starts = [(attempt["restart"], attempt["launch"]) for attempt in attempts]
    assert starts == [(0, 0), (0, 1), (1, 0)]
    assert job.resumed_at() == [4, 4]
    report = (job.run / "failure_report.txt").read_text()
    assert "failed 3 times without a checkpoint newer than step 4" in report
    assert f"RuntimeError: {train_failing.MESSAGE}" in report
    assert report.count("n[1-2]; rank ") == 3
    assert status["StdOut"] in report
    assert "not requeued: failed 3 times" in job.output()
    assert "requeued: failure 2 of 3: the last try" in job.output()
    assert "3 rank(s)" in job.rank_log()


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
    """`scancel` saves and ends the job, as does SIGUSR1 with Requeue=0. The next sbatch resumes."""
    tiny_runs.make_recipe(tmp_path, train={"max_steps": 100_000})
    job = slurm_runs.submit(slurm, "pretrain_14M.sh", tmp_path, options=("--nodes=1",))
    job.wait_for_step(3)
    slurm.run("scancel", job.number)
    slurm.wait(job.number, "CANCELLED")
    wait_for(lambda: slurm.idle_nodes() == 2, "the end of the ranks")
    saved = job.newest_checkpoint()
    assert saved >= 3 and slurm.job(job.number)["Restarts"] == "0"

    job = slurm_runs.submit(slurm, "pretrain_14M.sh", tmp_path, options=("--nodes=1",))
    job.wait_for_step(saved + 3)
    slurm.run("scontrol", "update", f"JobId={job.number}", "Requeue=0")
    slurm.run("scancel", "--signal=USR1", job.number)
    wait_for(lambda: "and the job has Requeue=0" in job.output(), "the end of the job")
    assert job.resumed_at() == [saved] and job.newest_checkpoint() > saved
