"""A real SLURM for tests: a controller and three nodes on this machine, on separate ports."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from blip_scale import launcher

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2", "n3")
MAIN_NODES = 2
"""Number of nodes in the default partition; `wide` has all."""
START_TIMEOUT_S = 60
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# A requeued job waits for cred_expire + 1 seconds (SLURM's default: 121; 5 is the least).
_CONF = """
ClusterName=blip
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
FirstJobId={first_job}
KillWait=15
SlurmdTimeout=10
MinJobAge=3600
NodeName=n[1-3] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[3]}] \
CPUs=4 RealMemory=8000 Gres=gpu:4
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=wide Nodes=n[1-3] MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE PriorityTier=2
"""
# Other devices replace GPUs: SLURM counts and assigns them, but ranks compute on the CPU.
_GPUS = "NodeName=n[1-3] Name=gpu File=/dev/null,/dev/zero,/dev/full,/dev/random\n"


class SlurmCluster:
    """Three nodes with four CPUs and four `GPUs` each, in one temporary folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool.{node}").mkdir()
        port = launcher.free_port(1, 2, 3)  # the controller's and the three nodes'
        ports = range(port, port + 4)
        # Ranks meet at a port that the job's number decides: two clusters at once differ in it.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        conf = _CONF.format(
            ports=ports, user=getpass.getuser(), folder=self.folder, first_job=1 + 100 * worker
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(_GPUS)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that point SLURM's commands to this cluster.

        The daemons are on root's PATH.
        """
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def start(self) -> None:
        """Start the daemons and wait until the nodes are idle."""
        files = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid")}
        self._start(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
            *files.values(), f"--log-file={self.folder}/munge.log",
            f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        wait_for((self.folder / "munge.socket").exists, "munged", START_TIMEOUT_S)
        self._start("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.idle_nodes("wide") == len(NODES), "all nodes", START_TIMEOUT_S)

    def stop(self) -> None:
        """End the jobs, then the daemons, and remove the folder."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run("scancel", "--user", getpass.getuser())
        for name in NODES:
            self.kill_node(name)
        for daemon in reversed(list(self._daemons.values())):
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node on its share of the cores, which its processes inherit."""
        cores = sorted(os.sched_getaffinity(0))
        share = cores[NODES.index(node) % len(cores) :: MAIN_NODES]
        self._start("taskset", "--cpu-list", ",".join(map(str, share)), "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Simulate a power cut: kill all processes of a node, its daemon first."""
        daemon = self._daemons.pop(node, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self, *nodes: str) -> list[psutil.Process]:
        """Processes that run on some nodes, including those of SLURM that supervise them."""
        processes = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if variables.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                if variables.get("SLURMD_NODENAME") in nodes:
                    processes[process.pid] = process
                    parent = process.parent()
                    if parent is not None and "slurmstepd" in "".join(parent.cmdline()):
                        processes[parent.pid] = parent
        return list(processes.values())

    def ranks(self, job: str | None = None) -> dict[int, psutil.Process]:
        """Training processes of a job, or of the only one, by rank, without loader workers.

        The batch script has the arguments and the variables of rank 0, and is none.
        """
        by_rank: dict[int, psutil.Process] = {}
        for process in self.processes(*NODES):
            with contextlib.suppress(psutil.Error):
                words, variables = process.cmdline(), process.environ()
                is_script = any(word.endswith("run_ranks.py") for word in words)
                is_python = process.name().startswith("python")
                is_rank = is_python and "--recipe" in words and not is_script
                if is_rank and job in (None, variables["SLURM_JOB_ID"]):
                    rank = int(variables["SLURM_PROCID"])
                    if rank not in by_rank or process.ppid() != by_rank[rank].pid:
                        by_rank[rank] = process
        return by_rank

    def run(self, *command: str, **environment: str) -> str:
        """Run one of SLURM's commands, and return its output.

        Raises:
            RuntimeError: the command failed; the message has its output.
        """
        done = subprocess.run(
            command, env=os.environ | self.environment | environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """State of a job as SLURM reports it: JobState, Restarts, ExitCode ..."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S+)", shown))

    def wait(self, job: str, state: str, timeout_s: float = 600, restarts: int = 0) -> None:
        """Wait until a job is in a state and has been restarted at least `restarts` times."""

        def reached() -> bool:
            status = self.job(job)
            ended = status["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
            assert not ended or status["JobState"] == state, f"it is {status['JobState']}"
            return status["JobState"] == state and int(status["Restarts"]) >= restarts

        try:
            wait_for(reached, f"job {job} {state}", timeout_s)
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{self.job(job)}\n{self.log_of(job)}\n{self.state()}"
            ) from None

    def state(self) -> str:
        """Describe the cluster for a failing test: nodes, queue, and the ends of the logs."""
        shown = [self.run("sinfo", "-N", "-o", "%N %T %C %E"), self.run("squeue", "--long")]
        for file in sorted(self.folder.glob("slurm*.log")):
            shown.append(f"== {file.name}\n{file.read_text(errors='replace')[-4000:]}")
        return "\n".join(shown)

    def log_of(self, job: str) -> str:
        """Log of a job."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text() if file.exists() else ""

    def idle_nodes(self, partition: str = "main") -> int:
        """Number of idle nodes of a partition."""
        try:
            states = self.run("sinfo", "-h", "-N", "-p", partition, "-o", "%t").split()
            return states.count("idle")
        except RuntimeError:  # the controller is still starting
            return 0

    def _start(self, *command: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        with (self.folder / "daemons.out").open("ab") as log:
            self._daemons[command[-1]] = subprocess.Popen(
                command, env=environment | self.environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, cwd=self.folder,
            )  # fmt: skip


def wait_for(moment: Callable[[], bool], what: str, timeout_s: float = 600) -> None:
    """Wait until `moment()` returns True.

    Most checks run a command of SLURM, which takes 20 ms of a core. The pause after a check is nine
    times as long as the check, within 0.05 and 0.3 s.
    """
    deadline = time.monotonic() + timeout_s
    began = time.monotonic()
    while not moment():
        now = time.monotonic()
        assert now < deadline, f"{what}: waited for {timeout_s} s"
        time.sleep(min(0.3, max(0.05, 9 * (now - began))))
        began = time.monotonic()


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running cluster. The test is skipped if Debian's packages are missing."""
    missing = [daemon for daemon in DAEMONS if shutil.which(daemon, path=_PATH) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    cluster = SlurmCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
