"""Run the ranks of a SLURM job, and restart them in the same allocation when they fail.

`run_ranks.py OUTPUT_DIR COMMAND...` is the last line of slurm/train.sh. srun starts COMMAND once
for each rank. When a rank dies or hangs, all ranks are restarted on the nodes that respond.
slurm/requeue.py decides when to requeue or stop the job instead. Settings are environment
variables:

- SPARE_NODES (0): number of nodes in the allocation that run no ranks until they replace others.
- MIN_NODES (all except spare nodes): minimum number of nodes to continue with. With fewer than all
  nodes, their number is a divisor of the full number, so the ranks still divide the batch.
- NODE_CHECK (true): shell command that a node must pass before a restart.
- MAX_FAILURES (3): number of failures without a newer checkpoint after which the job stops.
- FAILURE_WAIT (15): seconds from the failure of a rank until the others are ended. They only need
  this time to write their logs: ranks that wait for a dead one in NCCL never end by themselves.
- SLURM_WAIT (60): the same after a rank has finished, stopped on request or refused its input.
- SRUN_ARGS: additional arguments of srun, separated by spaces.

SIGUSR1 requests a stop: the ranks save, and the job is requeued. The batch script gets the signal
(`--signal=B:USR1@300`, `scancel --batch --signal=USR1`) and forwards it to the ranks. A request is
therefore also handled during a restart, or while ranks wait for a dead one. Ranks that get the
signal directly stop too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import requeue
from requeue import exit_codes, run_folder

_CHECK_S = 30
"""Time limit of the node check in seconds."""
_AFTER_WAIT_S = 60
"""Seconds after FAILURE_WAIT or SLURM_WAIT until srun is killed, for example if a node is gone."""
_ENDED = re.compile(r"srun: error: (?P<node>[\w.-]+): tasks? (?P<ranks>[\d,-]+): (?P<end>.+)")
_NODE_FAILED = re.compile(r"srun: error: Node failure on (?P<node>[\w.-]+)")
_USR1 = "User defined signal 1"
"""End of a rank that gets SIGUSR1 during its imports, before it has a handler."""
_KILL_MARGIN_S = 8
"""Seconds of SLURM's KillWait reserved for requeuing the job."""
_REFUSED = f"Exited with exit code {exit_codes.REFUSED}"
_STOPPED = {f"Exited with exit code {exit_codes.REQUEUE}", _USR1}
_NO_FAILURE = {f"Exited with exit code {exit_codes.DONE}", *_STOPPED}
_ENDED_FOR_OTHERS = {"Killed", "Terminated"}
"""Ends of ranks that were killed while they waited for a stopped rank."""


@dataclass
class Allocation:
    """Nodes of the job."""

    nodes: list[str]
    needed: int
    """Number of nodes of a full run."""
    least: int
    """Minimum number of nodes."""
    failures: Counter[str] = field(default_factory=Counter)
    """Node -> number of failures that began on it."""

    @classmethod
    def of_job(cls) -> Allocation:
        """Read the allocation of this job and its settings from the environment."""
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        nodes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        needed = len(nodes) - int(os.environ.get("SPARE_NODES", "0"))
        if needed < 1:
            raise ValueError(
                f"SPARE_NODES: {len(nodes)} nodes are allocated, so none would be left"
            )
        return cls(nodes, needed, int(os.environ.get("MIN_NODES", needed)))

    def select(self, usable: Sequence[str]) -> list[str]:
        """Choose nodes for the next start, with the fewest failures first.

        Return an empty list if `usable` has too few nodes.
        """
        sizes = range(min(self.needed, len(usable)), self.least - 1, -1)
        size = next((size for size in sizes if self.needed % size == 0), 0)
        calm = sorted(usable, key=lambda node: self.failures[node])[:size]
        return [node for node in self.nodes if node in calm]


@dataclass
class Ending:
    """How the ranks of one start ended."""

    exit_code: int
    seconds: float
    node: str = ""
    """Node of the rank that ended or stalled first; empty if unknown."""
    cause: str = ""
    """Description of that rank, its node, and how it ended."""
    first_ended: float = 0.0
    """Unix time at which the first rank ended."""


class Signals:
    """Signal handlers of the batch script.

    SIGUSR1 requests a stop. SIGTERM means that SLURM is ending the job.
    """

    def __init__(self) -> None:
        self.stop = bool(os.environ.pop("STOP_REQUESTED", ""))
        """Whether a stop was requested by a signal to the shell or to this process."""
        self.srun: subprocess.Popen[str] | None = None
        """Process that runs the ranks, if any."""
        self._wait_s = max(1.0, requeue.kill_wait_s() - _KILL_MARGIN_S)
        signal.signal(signal.SIGUSR1, self._pass_on)
        signal.signal(signal.SIGTERM, self._survive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # slurm/train.sh blocks it

    def _pass_on(self, number: int, frame: object) -> None:
        self.stop = True
        if self.srun is not None:
            self.srun.send_signal(number)

    def _survive(self, number: int, frame: object) -> None:
        """Stop waiting for ranks that hang or still save, early enough to requeue the job.

        At the time limit SLURM sends SIGTERM to the ranks and the script, and SIGKILL after its
        KillWait. The ranks can use all of that time, because the end of srun does not end them.
        """
        _after(self._wait_s, self._leave_ranks)

    def _leave_ranks(self) -> None:
        is_over = requeue.job_fields(os.environ["SLURM_JOB_ID"]).get("JobState") != "RUNNING"
        if is_over and self.srun is not None:
            self.srun.kill()


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit code of the batch script."""
    options = _parser().parse_args(arguments)
    signals = Signals()
    try:
        allocation = Allocation.of_job()
    except ValueError as error:
        _say(f"SPARE_NODES and MIN_NODES are numbers of nodes: {error}")
        return exit_codes.REFUSED
    if signals.stop:
        return _requeue_or_stop("stopped on request before the ranks started")
    nodes, launch, failed_at = allocation.select(allocation.nodes), 0, time.time()
    while True:
        idle = [node for node in allocation.nodes if node not in nodes]
        after = f", {time.time() - failed_at:.0f} s after the first rank ended"
        _say(
            f"start {launch} on {','.join(nodes)}{after if launch else ''}"
            f"{'; not used: ' if idle else ''}{','.join(idle)}"
        )
        ending = run_ranks(allocation, nodes, launch, options, signals)
        if ending.exit_code == exit_codes.DONE:
            (options.output_dir / run_folder.FAILURE_REPORT).unlink(missing_ok=True)
            _say("the run is done")
            return exit_codes.DONE
        if ending.cause:
            _say(f"first to end: {ending.cause}")
        code = _stops(allocation, nodes, launch, ending, options.output_dir, signals)
        if code is not None:
            return code
        usable = answering(allocation.nodes, signals)
        if signals.stop:
            return _requeue_or_stop("stopped on request before the ranks started again")
        silent = [node for node in allocation.nodes if node not in usable]
        if silent:
            _say(f"no answer or NODE_CHECK failed: {','.join(silent)}")
        nodes, launch, failed_at = allocation.select(usable), launch + 1, ending.first_ended
        if not nodes:
            reason = f"too few nodes: {len(usable)} answer, {allocation.least} must"
            return _requeue_or_stop(reason)


def _stops(
    allocation: Allocation,
    nodes: list[str],
    launch: int,
    ending: Ending,
    output_dir: Path,
    signals: Signals,
) -> int | None:
    """Record an attempt. Returns the batch script's exit code, or None to restart the ranks."""
    job = requeue.job_fields(os.environ["SLURM_JOB_ID"])
    if _is_ended_by_slurm(job):
        return ending.exit_code
    is_whole = nodes == allocation.nodes
    shown = os.environ["SLURM_JOB_NODELIST"] if is_whole else ",".join(nodes)
    try:
        attempts = requeue.note_attempt(
            output_dir, ending.exit_code, ending.seconds, launch, shown, ending.cause,
            ending.first_ended,
        )  # fmt: skip
    except OSError as error:  # without a count of failures the job might restart forever
        _say(f"not started again: can't record this failure in {output_dir}: {error}")
        return ending.exit_code
    last = attempts[-1]
    _say(
        f"attempt {last.restart}.{launch} ended with exit code {last.exit_code} after "
        f"{last.seconds} s; newest checkpoint: step {last.checkpoint_step}"
    )
    limit = int(os.environ.get("MAX_FAILURES", "3"))
    decision, reason = requeue.decide(attempts, job, limit, signals.stop)
    if decision is requeue.Next.RESTART:
        if last.failed and ending.node:
            allocation.failures[ending.node] += 1
        _say(f"restart {launch + 1} in this allocation: {reason}")
        return None
    if decision is requeue.Next.REQUEUE:
        _say(f"requeued: {reason}; resumes at step {last.checkpoint_step}")
        return requeue.requeue(last.job)
    report = ""
    if last.failed:
        report = f"; see {requeue.write_report(attempts, output_dir, job)}"
    _say(f"not requeued: {reason}{report}")
    return ending.exit_code


def _is_ended_by_slurm(job: Mapping[str, str]) -> bool:
    """Return True and print a line if SLURM has ended the job, which must not be requeued here.

    Either the job was cancelled, or SLURM requeued it after preemption or a node failure.
    """
    if job.get("JobState") == "RUNNING" or job.get("Reason") == "TimeLimit":
        return False
    _say(f"not requeued here: SLURM has the job as {job.get('JobState', 'unknown')}")
    return True


def run_ranks(
    allocation: Allocation,
    nodes: list[str],
    launch: int,
    options: argparse.Namespace,
    signals: Signals,
) -> Ending:
    """Start all ranks on `nodes`, and wait for their end."""
    began, began_at = time.monotonic(), time.time()
    command = [*_srun(allocation, nodes, launch, options.output_dir), *options.command]
    process = subprocess.Popen(
        command, env=os.environ | _rendezvous(nodes[0], launch), stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    assert process.stderr is not None
    signals.srun = process
    if signals.stop:  # the signal came before the process existed
        process.send_signal(signal.SIGUSR1)
    ending = Ending(exit_codes.FAILED, 0.0)
    wait_s, failure_wait_s = int(os.environ["SLURM_WAIT"]), int(os.environ["FAILURE_WAIT"])
    refused = stopped = False
    timers: list[threading.Timer] = []
    for line in process.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        match = _ENDED.match(line) or _NODE_FAILED.match(line)
        if match is None:
            continue
        node, end = match["node"], match.groupdict().get("end")
        if not ending.first_ended:
            ending.first_ended = time.time()
            refused, stopped = end == _REFUSED, end in _STOPPED
            timers.append(_after(wait_s + _AFTER_WAIT_S, process.kill))
            if end == _USR1:
                timers.append(_after(failure_wait_s, process.terminate))
        is_waiting = stopped and end in _ENDED_FOR_OTHERS
        if end in _NO_FAILURE or ending.cause or is_waiting:
            continue
        ending.node = node
        ending.cause = f"rank {match['ranks']} on {node}: {end}" if end else f"node {node} failed"
        if end != _REFUSED:
            timers.append(_after(failure_wait_s, process.terminate))
            timers.append(_after(failure_wait_s + _AFTER_WAIT_S, process.kill))
    code = process.wait()
    signals.srun = None
    for timer in timers:
        timer.cancel()
    ending.exit_code = code if code >= 0 else 128 - code
    is_early = ending.exit_code == exit_codes.of_signal(signal.SIGUSR1)  # srun itself
    if (stopped or is_early) and not ending.cause:
        ending.exit_code = exit_codes.REQUEUE
    if refused:  # ranks that waited for the refusing one were killed
        ending.exit_code = exit_codes.REFUSED
    ending.seconds = time.monotonic() - began
    ending.first_ended = ending.first_ended or time.time()
    if code == -signal.SIGKILL and not ending.cause:
        ending.cause = "ranks that had not ended in time"
    blame_hanging_rank(ending, options.output_dir, began_at)
    return ending


def _after(seconds: float, action: Callable[[], None]) -> threading.Timer:
    """Start a timer that does not delay the end of the script."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def blame_hanging_rank(ending: Ending, output_dir: Path, since: float) -> None:
    """If ranks ended because of a stall, name the rank for which the others waited."""
    stalls = requeue.stalls_since(output_dir, since)
    if not stalls:
        return
    suspected = next((entry["suspects"][0] for entry in stalls if entry.get("suspects")), None)
    first = suspected or {**stalls[0], "reason": "stalled"}
    ending.node = str(first["node"])
    phase = f"no progress for {stalls[0]['limit_s']:g} s while {stalls[0]['phase']}"
    ending.cause = f"rank {first['rank']} on {ending.node} {first['reason']}; {phase}"


def _srun(allocation: Allocation, nodes: list[str], launch: int, output_dir: Path) -> list[str]:
    """Command that starts the ranks.

    It starts one task per rank, without a launcher in between. Signals therefore reach every rank,
    each rank has its own log, and every exit code counts.
    """
    command = ["srun", f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK', '1')}"]
    command += ["--open-mode=append", f"--output={output_dir / run_folder.LOGS}/task_%t.log"]
    if nodes != allocation.nodes:
        tasks = _tasks_per_node()
        command += [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
        command += [f"--ntasks={tasks * len(nodes)}", f"--ntasks-per-node={tasks}"]
    if launch:  # SLURM may still count the resources of ranks on a lost node
        command.append("--overlap")
    return [*command, *os.environ.get("SRUN_ARGS", "").split()]


def _tasks_per_node() -> int:
    """Number of tasks per node; SLURM writes `8(x4)`."""
    tasks = os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ["SLURM_TASKS_PER_NODE"]
    return int(re.split(r"[(,]", tasks)[0])


def _rendezvous(node: str, launch: int) -> dict[str, str]:
    """Environment variables of the rendezvous, with a port for this job and start."""
    shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True)
    address = re.search(r"NodeAddr=(\S+)", shown.stdout)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    port = 10_000 + (int(os.environ["SLURM_JOB_ID"]) * 10 + restarts + launch) % 20_000
    return {
        "MASTER_ADDR": address[1] if address else node,
        "MASTER_PORT": str(port),
        "BLIP_SCALE_LAUNCH": str(launch),
    }


def answering(nodes: list[str], signals: Signals) -> list[str]:
    """Nodes that start a task and pass NODE_CHECK within 30 s.

    If SIGUSR1 ends a check, `signals` records the request.
    """
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_NTASKS_PER_NODE"}
    check = os.environ.get("NODE_CHECK", "true")
    probes = {}
    for node in nodes:
        command = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--cpus-per-task=1"]
        command += [f"--nodelist={node}", "bash", "-c", check]
        probes[node] = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
    deadline = time.monotonic() + _CHECK_S
    for probe in probes.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            probe.wait(max(0.0, deadline - time.monotonic()))
    for probe in probes.values():
        if probe.poll() is None:
            probe.kill()
        signals.stop |= probe.returncode == exit_codes.of_signal(signal.SIGUSR1)
    return [node for node, probe in probes.items() if probe.returncode == 0]


def _requeue_or_stop(reason: str) -> int:
    """Requeue the job, unless SLURM has ended it or it has Requeue=0."""
    job = requeue.job_fields(os.environ["SLURM_JOB_ID"])
    if _is_ended_by_slurm(job):
        return exit_codes.FAILED
    if job.get("Requeue") == "0":
        _say(f"not requeued: {reason}, and the job has Requeue=0; submit again to resume")
        return exit_codes.FAILED
    _say(f"requeued: {reason}")
    return requeue.requeue(os.environ["SLURM_JOB_ID"])


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run the ranks of a job, and restart them when they fail.",
        epilog="Settings are environment variables, listed at the top of this file.",
    )
    parser.add_argument("output_dir", type=Path, help="folder of the run")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command of a rank")
    return parser


if __name__ == "__main__":
    sys.exit(main())
