"""Signals that reach a job while its ranks start again, and time limits that ranks do not meet.

The ranks have no network. All jobs run at the same time, as they wait for SLURM most of it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import quick_rank
import slurm_runs
from slurm_cluster import SlurmCluster, wait_for
from slurm_runs import Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def stop_while_ranks_wait(job: Job) -> None:
    """A stop is requested while rank 0 waits for the dead rank 1, which it can't notice."""
    job.cluster.ranks(job.number)[1].kill()
    job.wait_for_line("Killed")
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    wait_until_requeued(job)


def stop_during_checks(job: Job) -> None:
    """The same while nodes are checked. The signal goes to steps alone, which are the checks."""
    job.cluster.ranks(job.number)[1].kill()
    wait_for_checks(job)
    job.cluster.run("scancel", "--signal=USR1", job.number)
    wait_until_requeued(job)


def stop_during_imports(job: Job) -> None:
    """The same while ranks import, before they handle signals."""
    job.cluster.ranks(job.number)[1].kill()
    job.wait_for_line("start 1 on")
    wait_for(lambda: len(job.cluster.ranks(job.number)) == 2, "two ranks")
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    wait_until_requeued(job)


def cancel_during_checks(job: Job) -> None:
    """A person cancels the job while nodes are checked."""
    job.cluster.ranks(job.number)[1].kill()
    wait_for_checks(job)
    job.cluster.run("scancel", job.number)
    wait_for(lambda: state_of(job) not in ("RUNNING", "COMPLETING"), "the end of the job")


def stop_before_python_runs(job: Job) -> None:
    """The same before the job script handles signals in Python. The interpreter is a slow one."""
    job.wait_for_line(SLOW_START)
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    wait_until_requeued(job)


def come_near_the_limit(job: Job) -> None:
    """Less than five minutes are left, so SLURM sends the signal that the script asks for."""
    job.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    wait_until_requeued(job)


def reach_the_limit_in_a_save(job: Job) -> None:
    """The ranks' save takes longer than what is left, and than SLURM's KillWait after it."""
    (job.run / quick_rank.SLOW).touch()
    come_near_the_limit(job)


def be_requeued(job: Job) -> None:
    """An administrator requeues the job while it runs."""
    job.cluster.run("scontrol", "requeue", job.number)
    job.wait_for_line("not requeued here: SLURM has the job as")
    wait_until_requeued(job)


SLOW_START = "the interpreter is being read from a slow disk"
SLOW_PYTHON = f"""#!/usr/bin/env bash
echo {SLOW_START}
sleep 5
exec {sys.executable} "$@"
"""
EVENTS: dict[Callable[[Job], None], dict[str, str]] = {
    reach_the_limit_in_a_save: {},
    come_near_the_limit: {},
    stop_while_ranks_wait: {"FAILURE_WAIT": "4"},
    cancel_during_checks: {"FAILURE_WAIT": "1", "NODE_CHECK": "sleep 6"},
    stop_during_checks: {"FAILURE_WAIT": "1", "NODE_CHECK": "sleep 6"},
    stop_during_imports: {"FAILURE_WAIT": "1"},
    stop_before_python_runs: {"PYTHON": SLOW_PYTHON},
    be_requeued: {},
}
"""Events -> environment variables of the job. Four jobs fit on the nodes at once."""


def processes_of(job: Job) -> list[str]:
    """Names of the processes of a job on its nodes."""
    names = []
    for process in job.cluster.processes("n1", "n2"):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if process.environ().get("SLURM_JOB_ID") == job.number:
                names.append(process.name())
    return names


def wait_for_checks(job: Job) -> None:
    """Wait until NODE_CHECK runs on both nodes."""
    wait_for(lambda: processes_of(job).count("sleep") == 2, "checks on both nodes", 120)


def state_of(job: Job) -> str:
    return job.cluster.job(job.number)["JobState"]


def wait_until_requeued(job: Job) -> None:
    wait_for(lambda: job.cluster.job(job.number)["Restarts"] == "1", "a requeue", 240)


@pytest.fixture(scope="module")
def jobs(
    slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Callable[[Job], None], Job]]:
    """Jobs to which the events have happened."""

    def happen(event: Callable[[Job], None]) -> Job:
        folder, environment = tmp_path_factory.mktemp(event.__name__), EVENTS[event]
        if "PYTHON" in environment:
            python = folder / "python"
            python.write_text(environment["PYTHON"])
            python.chmod(0o755)
            environment = {"PYTHON": str(python)}
        job = slurm_runs.submit_quick(slurm, folder, **environment)
        if event is not stop_before_python_runs:
            wait_for(lambda: job.newest_checkpoint() >= quick_rank.EVERY_STEPS, "a checkpoint", 120)
        event(job)
        with contextlib.suppress(RuntimeError):  # it is cancelled already
            slurm.run("scancel", job.number)
        return job

    with ThreadPoolExecutor(len(EVENTS)) as threads:
        yield dict(zip(EVENTS, threads.map(happen, EVENTS), strict=True))
    wait_for(lambda: slurm.idle_nodes() == 2, "the end of the jobs")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (stop_while_ranks_wait, "requeued: stopped on request; resumes at step"),
        (stop_during_checks, "requeued: stopped on request before the ranks started again"),
        (stop_during_imports, "requeued: stopped on request; resumes at step"),
        (stop_before_python_runs, "requeued: stopped on request before the ranks started"),
        (come_near_the_limit, "requeued: stopped on request; resumes at step"),
        (reach_the_limit_in_a_save, "requeued: stopped on request; resumes at step"),
    ],
)
def test_a_job_is_requeued_once(
    jobs: dict[Callable[[Job], None], Job], event: Callable[[Job], None], words: str
) -> None:
    log = jobs[event].output()
    assert words in log and log.count("requeued: ") == 1
    assert "start 2 on" not in log and "could not requeue" not in log


def test_slurm_requeues_a_job_itself(jobs: dict[Callable[[Job], None], Job]) -> None:
    """Its ranks save, and the script leaves the job alone."""
    log = jobs[be_requeued].output()
    assert "Exited with exit code 75" in log
    assert "not requeued here: SLURM has the job as" in log


def test_a_stop_in_a_restart_is_no_failure(jobs: dict[Callable[[Job], None], Job]) -> None:
    attempts = json.loads((jobs[stop_during_imports].run / "attempts.json").read_text())
    assert [attempt["exit_code"] for attempt in attempts] == [137, 75]
    assert [attempt["failed"] for attempt in attempts] == [True, False]


def test_a_save_that_is_too_long_is_a_failure(jobs: dict[Callable[[Job], None], Job]) -> None:
    """MAX_FAILURES counts it, or a run that can't save would go on for ever."""
    attempts = json.loads((jobs[reach_the_limit_in_a_save].run / "attempts.json").read_text())
    assert [attempt["failed"] for attempt in attempts] == [True]


def test_a_cancelled_job_does_not_come_back(jobs: dict[Callable[[Job], None], Job]) -> None:
    job = jobs[cancel_during_checks]
    assert state_of(job) == "CANCELLED" and job.cluster.job(job.number)["Restarts"] == "0"
    assert "not requeued here: SLURM has the job as" in job.output()


def test_no_process_is_left(jobs: dict[Callable[[Job], None], Job], slurm: SlurmCluster) -> None:
    wait_for(lambda: slurm.idle_nodes() == 2, "the end of the jobs")
    for job in jobs.values():
        assert processes_of(job) == []
