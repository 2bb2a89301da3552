"""A two-node run from a bucket survives everything that happens to jobs.

Its results equal those of an undisturbed run bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import slurm_runs
import tiny_runs
import torch
from s3_server import S3Server
from slurm_cluster import SlurmCluster, wait_for
from slurm_runs import EVERY_STEPS, Job

pytestmark = [pytest.mark.slurm, pytest.mark.s3, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("BLIP_KILLS", "2"))
"""How often the run that is killed at random moments is killed."""
STEPS = 24 + 2 * KILLS
RECORDED = "log.sample_ids=true"


@pytest.fixture(scope="module")
def undisturbed(
    slurm: SlurmCluster, _server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Job:
    """Run to the end undisturbed, with one `GPU` per node."""
    folder = tmp_path_factory.mktemp("undisturbed")
    slurm_runs.make_recipe(folder, _server, STEPS)
    job = slurm_runs.submit(slurm, "pretrain_129M.sh", folder, RECORDED, **_server.environment)
    slurm.wait(job.number, "COMPLETED")
    return job


def training_record(job: Job) -> dict[int, list[str]]:
    """Sample ids of every step, in order of the ranks."""
    by_step: dict[int, list[str]] = {}
    for rank in range(2):
        lines = (job.run / "samples" / f"rank_{rank}.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [entry["step"] for entry in steps] == list(range(1, STEPS + 1)), f"rank {rank}"
        for entry in steps:
            by_step.setdefault(entry["step"], []).extend(entry["ids"])
    return by_step


def attempts_of(job: Job) -> int:
    """Number of starts that have ended."""
    file = job.run / "attempts.json"
    return len(json.loads(file.read_text())) if file.exists() else 0


def assert_equal(job: Job, undisturbed: Job) -> None:
    """Losses and samples of all steps are equal, and so is the last checkpoint."""
    assert tiny_runs.losses(job.run) == tiny_runs.losses(undisturbed.run), job.output()
    assert training_record(job) == training_record(undisturbed)
    last = f"checkpoints/step_{STEPS:08d}"
    for kind in ("weight", "momentum", "exp_avg", "exp_avg_sq"):
        tensors = tiny_runs.whole_tensors(job.run / last, kind)
        expected = tiny_runs.whole_tensors(undisturbed.run / last, kind)
        assert tensors.keys() == expected.keys() and tensors
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors), kind


def test_two_nodes_from_a_bucket_to_the_end(undisturbed: Job, slurm: SlurmCluster) -> None:
    """Each node has its own task and cache, each rank its own log; an epoch has no sample twice."""
    job = slurm.job(undisturbed.number)
    assert (job["NumNodes"], job["ExitCode"], job["Restarts"]) == ("2", "0:0", "0")
    assert "gres/gpu" in job.get("TresPerNode", "") or "gres:gpu" in job.get("TresPerNode", "")
    assert "the run is done" in undisturbed.output()
    summary = json.loads((undisturbed.run / "summary.json").read_text())
    assert (summary["steps"], summary["ranks"]) == (STEPS, 2)
    for rank in range(2):
        assert (undisturbed.run / "logs" / f"task_{rank}.log").exists()
        assert list((undisturbed.folder / f"cache-n{rank + 1}").glob("shard.*"))
    seen: Counter[str] = Counter()
    per_epoch = 64 // 16
    for step, ids in training_record(undisturbed).items():
        seen.update(ids)
        if step % per_epoch == 0:
            assert set(seen.values()) == {step // per_epoch} and len(seen) == 64


def test_everything_that_happens_to_a_job(
    undisturbed: Job, slurm: SlurmCluster, _server: S3Server, tmp_path: Path
) -> None:
    """The job survives SIGUSR1, a node without power and no spare one, and preemption.

    It stays one run under one job number, and nobody runs sbatch again. Dead ranks are below,
    time limits and other requeues in test_slurm_signals.py.
    """
    slurm_runs.make_recipe(tmp_path, _server, STEPS)
    # No `GPUs` here: SLURM 22.05 forgets those of a requeued job whose node went down.
    job = slurm_runs.submit(
        slurm, "pretrain_129M.sh", tmp_path, RECORDED,
        options=("--gpus-per-node=0",), SLURM_WAIT="5", **_server.environment,
    )  # fmt: skip
    part = STEPS // 4

    job.wait_for_step(part)
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    slurm.wait(job.number, "RUNNING", restarts=1)
    stopped = job.newest_checkpoint()
    job.wait_for_step(2 * part)
    assert job.resumed_at() == [stopped], "a stop on request loses no step"
    assert "exit code 75" in job.output()

    slurm.kill_node("n2")
    wait_for(lambda: slurm.job(job.number)["Restarts"] == "2", "a requeue")
    assert "requeued: too few nodes: 1 answer, 2 must" in job.output()
    slurm.start_node("n2")
    slurm.wait(job.number, "RUNNING", restarts=2)
    wait_for(lambda: len(job.resumed_at()) == 2, "the second resume")
    for rank in slurm.ranks().values():  # or the run is over before the urgent job is looked at;
        rank.suspend()  # preemption wakes them

    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", f"-o{tmp_path}/u")
    slurm.run("sbatch", *urgent)
    slurm.wait(job.number, "RUNNING", restarts=3)
    slurm.wait(job.number, "COMPLETED")
    assert_equal(job, undisturbed)
    attempts = json.loads((job.run / "attempts.json").read_text())
    assert not (job.run / "failure_report.txt").exists()
    failed = [attempt["failed"] for attempt in attempts]
    # A minute after a node is lost, SLURM 22.05 kills what runs there under the number of the lost
    # step. In a job that was requeued, that is a rank of the next attempt.
    assert failed[1] and failed.count(True) <= 2
    assert 3 <= len(job.resumed_at()) <= 4
    assert 75 in [attempt["exit_code"] for attempt in attempts]


def test_killed_at_random_moments(
    undisturbed: Job, slurm: SlurmCluster, _server: S3Server, tmp_path: Path
) -> None:
    """SIGKILL a random rank at a random moment, BLIP_KILLS times. Each has a loader worker.

    One in four kills hits the start, the others a step or a save.
    """
    slurm_runs.make_recipe(tmp_path, _server, STEPS, workers=1)
    job = slurm_runs.submit(
        slurm, "pretrain_129M.sh", tmp_path, RECORDED,
        MAX_FAILURES="1000", **_server.environment,
    )  # fmt: skip
    dice = random.Random(time.time_ns())
    lost = []
    for kill in range(KILLS):
        begun = job.starts()
        saved = job.newest_checkpoint()
        wait_for(lambda: attempts_of(job) == kill and len(slurm.ranks()) == 2, "two ranks")  # noqa: B023
        if dice.random() < 0.25:
            time.sleep(dice.random() * 8)
        else:
            goal = min(saved + dice.randint(1, EVERY_STEPS + 1), STEPS - 2)
            wait_for(lambda: job.starts() > begun and job.step() >= goal, f"step {goal}")  # noqa: B023
            time.sleep(dice.random() * 0.3)
        slurm.ranks()[dice.randint(0, 1)].kill()
        wait_for(lambda: attempts_of(job) == kill + 1, "the end of the ranks")  # noqa: B023
        lost.append((job.step(), job.newest_checkpoint()))
    slurm.wait(job.number, "COMPLETED")
    assert slurm.job(job.number)["Restarts"] == "0"
    assert_equal(job, undisturbed)
    assert all(0 <= step - saved <= EVERY_STEPS for step, saved in lost), lost
    print(f"{KILLS} kills; step reached and newest checkpoint: {lost}")
