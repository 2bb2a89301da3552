"""A run goes on in its allocation after a dead rank, a rank that hangs and a node without power.

Its losses equal those of an undisturbed run bit for bit.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
import slurm_runs
import tiny_runs
import train_slowly
from slurm_cluster import SlurmCluster, wait_for
from slurm_runs import Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

STEPS = 16
EVALUATED_STEP = 8
RECOVERY_S = 120
"""Longest time from the death of a rank to the next optimizer step."""
HANG_S = 20
FAILURE_WAIT_S = 15
"""Default of FAILURE_WAIT."""
SLOWLY = f"{sys.executable} {train_slowly.__file__}"
"""Command of a rank. A tiny network alone would be done before a test can hit a step."""


def make_recipe(folder: Path) -> Path:
    return tiny_runs.make_recipe(
        folder,
        train={"max_steps": STEPS},
        checkpoint={"every_steps": EVALUATED_STEP, "keep_last": 2},
        evaluation={"every_steps": EVALUATED_STEP},
        hang_limits={"step_s": HANG_S, "evaluation_s": HANG_S},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny_runs.train(make_recipe(folder), 2)
    return folder / "run"


def evaluations(run: Path) -> list[dict[str, float]]:
    """Step and figures of all evaluations in metrics.jsonl, in its order."""
    figures = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        heldout = {name: value for name, value in line.items() if name.startswith("heldout/")}
        if heldout:
            figures.append({"step": line["step"], **heldout})
    return figures


def is_evaluating(run: Path) -> bool:
    """Whether the heartbeat says that an evaluation is under way."""
    file = run / "heartbeat.json"
    return file.exists() and '"phase": "evaluating"' in file.read_text()


def next_step_after(job: Job, moment: float) -> float:
    """Seconds from a Unix time to the end of the first optimizer step of the ranks' next start."""
    starts = job.starts()
    step: list[float] = []

    def came() -> bool:
        if job.starts() > starts:
            lines = (job.run / "metrics.jsonl").read_text().splitlines()
            entries = [json.loads(line) for line in lines if line.endswith("}")]
            times = [entry["time"] for entry in entries if "loss/total" in entry]
            step.extend(when for when in times if when > moment)
        return bool(step)

    wait_for(came, f"a step of the next start\n{job.output()}", RECOVERY_S + 60)
    return step[0] - moment


def test_a_rank_that_dies_or_hangs_costs_two_minutes(
    undisturbed: Path,
    slurm: SlurmCluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 1 is stopped in an evaluation without ending, and in the next start it is killed.

    Rank 0 does not notice the death, as ranks that wait in NCCL. The evaluation that was cut off is
    done again. Once it is done, the restart from the checkpoint before it does not repeat it.
    """
    make_recipe(tmp_path)
    job = slurm_runs.submit(
        slurm, "pretrain_14M.sh", tmp_path,
        TRAIN=SLOWLY, SRUN_ARGS=f"--error={tmp_path}/step_%t.log --unbuffered", MAX_FAILURES="4",
    )  # fmt: skip
    job.wait_for_step(EVALUATED_STEP - 4)
    ranks = slurm.ranks()
    wait_for(lambda: is_evaluating(job.run), "the evaluation")
    stopped = time.time()
    ranks[1].suspend()
    after_hang_s = next_step_after(job, stopped)
    assert len(evaluations(job.run)) == 1, "the evaluation that was cut off, done again"
    ranks = slurm.ranks()
    died = time.time()
    ranks[0].suspend()
    ranks[1].kill()
    after_death_s = next_step_after(job, died)
    slurm.wait(job.number, "COMPLETED")
    assert tiny_runs.losses(job.run) == tiny_runs.losses(undisturbed), job.output()
    assert evaluations(job.run) == evaluations(undisturbed), "all once, with the same figures"
    assert slurm.job(job.number)["Restarts"] == "0"
    assert after_death_s <= RECOVERY_S and after_hang_s <= RECOVERY_S + HANG_S

    log = job.output()
    assert "first to end: rank 1 on n2: Killed" in log
    waited = re.search(r"start 2 on n1,n2, (\d+) s after the first rank ended", log)
    assert waited and int(waited[1]) < FAILURE_WAIT_S + 30, log
    assert "restart 2 in this allocation: failure 2 of 4 without a newer checkpoint" in log
    assert job.resumed_at() == [EVALUATED_STEP] * 2
    assert f"step {EVALUATED_STEP} was evaluated before" in job.rank_log()
    hang = f"no progress for {HANG_S} s while evaluating"
    assert "first to end: rank 1 on n2 gives no sign of life; last seen (" in log
    assert f"rank 0 on n1 stalled: {hang}" in job.rank_log()
    assert "Timeout (0:00:" in job.rank_log() and "in _evaluate" in job.rank_log()
    attempts = json.loads((job.run / "attempts.json").read_text())
    assert [attempt["launch"] for attempt in attempts] == [0, 1]
    assert f"rank 0 on n1 stalled: {hang}" in (tmp_path / "step_0.log").read_text(), "SRUN_ARGS"
    with capsys.disabled():
        print(f"\nnext step {after_death_s:.1f} s after a death, {after_hang_s:.1f} s after a stop")


def test_a_spare_node_replaces_one_without_power(
    undisturbed: Path, slurm: SlurmCluster, tmp_path: Path
) -> None:
    make_recipe(tmp_path)
    job = slurm_runs.submit(
        slurm, "pretrain_14M.sh", tmp_path,
        options=("--partition=wide", "--nodes=3", "--gpus-per-node=0"),
        SPARE_NODES="1", TRAIN=SLOWLY,
    )  # fmt: skip
    job.wait_for_step(5)
    lost = time.time()
    slurm.kill_node("n2")
    try:
        recovery_s = next_step_after(job, lost)
        slurm.wait(job.number, "COMPLETED")
    finally:
        slurm.start_node("n2")
        wait_for(lambda: slurm.idle_nodes("wide") == 3, "n2 is back")
    assert tiny_runs.losses(job.run) == tiny_runs.losses(undisturbed), job.output()
    log = job.output()
    assert "start 0 on n1,n2; not used: n3" in log
    assert "no answer or NODE_CHECK failed: n2" in log and "start 1 on n1,n3" in log
    assert slurm.job(job.number)["Restarts"] == "0"
    assert recovery_s <= RECOVERY_S
