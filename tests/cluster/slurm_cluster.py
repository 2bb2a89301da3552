"""A real SLURM for tests: a controller and two nodes on this machine, on ports of their own."""

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
NODES = ("n1", "n2")
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
KillWait=15
SlurmdTimeout=10
MinJobAge=3600
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] \
CPUs=4 RealMemory=8000 Gres=gpu:4
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE PriorityTier=2
"""
# Devices stand in for GPUs: SLURM counts and hands them out, the ranks compute on the CPU.
_GPUS = "NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero,/dev/full,/dev/random\n"


class SlurmCluster:
    """Two nodes of four CPUs and four `GPUs` each; everything lies in one temporary folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool.{node}").mkdir()
        port = launcher.free_port(1, 2)  # the controller's and the two nodes'
        ports = range(port, port + 3)
        conf = _CONF.format(ports=ports, user=getpass.getuser(), folder=self.folder)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(_GPUS)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)

    @property
    def environment(self) -> dict[str, str]:
        """What leads SLURM's commands to this cluster; its daemons lie where root finds them."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
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
        wait_for(lambda: self.idle_nodes() == len(NODES), "both nodes", START_TIMEOUT_S)

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
        """Start the daemon of a node, on its share of the cores: what it starts stays there."""
        cores = sorted(os.sched_getaffinity(0))
        share = cores[NODES.index(node) % len(cores) :: len(NODES)]
        self._start("taskset", "--cpu-list", ",".join(map(str, share)), "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: everything on the node ends at once, its daemon first."""
        daemon = self._daemons.pop(node, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self, node: str) -> list[psutil.Process]:
        """All processes that run on a node, and those of SLURM that watch over them."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if variables.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                if variables.get("SLURMD_NODENAME") == node:
                    found[process.pid] = process
                    parent = process.parent()
                    if parent is not None and "slurmstepd" in "".join(parent.cmdline()):
                        found[parent.pid] = parent
        return list(found.values())

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes of the running job, by rank; loader workers left out."""
        found: dict[int, psutil.Process] = {}
        for node in NODES:
            for process in self.processes(node):
                with contextlib.suppress(psutil.Error):
                    if "--recipe" in process.cmdline() and process.name().startswith("python"):
                        rank = int(process.environ()["SLURM_PROCID"])
                        if rank not in found or process.ppid() != found[rank].pid:
                            found[rank] = process
        return found

    def run(self, *command: str, **environment: str) -> str:
        """Output of one of SLURM's commands.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        done = subprocess.run(
            command, env=os.environ | self.environment | environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode ..."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S+)", shown))

    def wait(self, job: str, state: str, timeout_s: float = 600, restarts: int = 0) -> None:
        """Until a job is in a state, having been started anew at least so many times."""

        def reached() -> bool:
            found = self.job(job)
            ended = found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
            assert not ended or found["JobState"] == state, f"it is {found['JobState']}"
            return found["JobState"] == state and int(found["Restarts"]) >= restarts

        try:
            wait_for(reached, f"job {job} {state}", timeout_s)
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{self.job(job)}\n{self.said(job)}\n{self.state()}"
            ) from None

    def state(self) -> str:
        """What the cluster is about, for a test that fails: nodes, queue, the ends of the logs."""
        shown = [self.run("sinfo", "-N", "-o", "%N %T %C %E"), self.run("squeue", "--long")]
        for file in sorted(self.folder.glob("slurm*.log")):
            shown.append(f"== {file.name}\n{file.read_text(errors='replace')[-4000:]}")
        return "\n".join(shown)

    def said(self, job: str) -> str:
        """The log of a job."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text() if file.exists() else ""

    def idle_nodes(self) -> int:
        """Number of nodes that wait for work."""
        try:
            return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split().count("idle")
        except RuntimeError:  # the controller isn't up yet
            return 0

    def _start(self, *command: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        with (self.folder / "daemons.out").open("ab") as log:
            self._daemons[command[-1]] = subprocess.Popen(
                command, env=environment | self.environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, cwd=self.folder,
            )  # fmt: skip


def wait_for(moment: Callable[[], bool], what: str, timeout_s: float = 600) -> None:
    """Until `moment()` comes true."""
    deadline = time.monotonic() + timeout_s
    while not moment():
        assert time.monotonic() < deadline, f"{what}: waited for {timeout_s} s"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running cluster; without Debian's packages the test is skipped."""
    missing = [daemon for daemon in DAEMONS if shutil.which(daemon, path=_PATH) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    cluster = SlurmCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
