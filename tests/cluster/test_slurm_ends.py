"""How a job ends when it should not go on: it fails again and again, it is refused, somebody stops
it."""

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
    """Three starts of three ranks, two of them on one node; the last checkpoint stays."""
    tiny_runs.make_recipe(tmp_path, train={"max_steps": 12, "global_batch_size": 12})
    job = slurm_runs.submit(
        slurm, "pretrain_14M.sh", tmp_path, "checkpoint.every_steps=4",
        options=("--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--gpus-per-node=2"),
        TRAIN=f"{sys.executable} {train_failing.__file__}",
    )  # fmt: skip
    slurm.wait(job.number, "FAILED", timeout_s=900)
    found = slurm.job(job.number)
    assert (found["Restarts"], found["ExitCode"]) == ("2", "1:0"), job.said()
    attempts = json.loads((job.run / "attempts.json").read_text())
    assert [one["checkpoint_step"] for one in attempts] == [4, 4, 4]
    assert job.resumed_at() == [4, 4]
    report = (job.run / "failure_report.txt").read_text()
    assert "failed 3 times without a checkpoint newer than step 4" in report
    assert f"RuntimeError: {train_failing.MESSAGE}" in report
    assert report.count("n[1-2]") == 3 and found["StdOut"] in report
    assert "not requeued: failed 3 times" in job.said()
    assert "3 rank(s)" in job.rank_log()


def test_a_refused_recipe_is_not_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Both ranks refuse the weights to start from, a moment apart; one of them says why."""
    tiny_runs.make_recipe(tmp_path)
    job = slurm_runs.submit(slurm, "finetune.sh", tmp_path, INIT="not/there.pth")
    slurm.wait(job.number, "FAILED")
    found = slurm.job(job.number)
    assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0"), job.said()
    assert "not requeued: the input was refused" in job.said()
    assert "model.checkpoint" in (job.run / "logs" / "task_0.log").read_text()
    assert not (job.run / "failure_report.txt").exists()


def test_stopped_by_a_person_a_job_stays_stopped(slurm: SlurmCluster, tmp_path: Path) -> None:
    """`scancel` saves and ends; Requeue=0 with SIGUSR1 as well. The next sbatch goes on."""
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
    wait_for(lambda: "not requeued: the job has Requeue=0" in job.said(), "the end of the job")
    assert job.resumed_at() == [saved] and job.newest_checkpoint() > saved
