"""Rank of this process under any launcher, and signal handling until the run begins.

PyTorch's launchers set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE in the environment. `srun`
and `mpirun` set other variables.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import signal
import socket
import sys
import zlib
from types import FrameType
from typing import NoReturn

from blip_scale.config import exit_codes
from blip_scale.errors import RefusedInput

_FIRST_PORT, _PORTS = 10_000, 20_000  # below the range from which systems assign ports


_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE",
     "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PALS_LOCAL_RANKID", "PMI_SIZE", "PALS_LOCAL_SIZE"),
)  # fmt: skip
"""Names of the variables with rank, local rank, number of ranks, and number of ranks on the node.
Rows: Open MPI, MVAPICH, MPICH and Intel MPI, Cray's PALS."""
_MPI_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PALS_APID")


def adopt() -> None:
    """Set PyTorch's launcher variables from those of `srun` or MPI, and check them.

    Raises:
        RefusedInput: variables are missing, are not numbers, or contradict each other.
    """
    adopt_srun_step()
    _adopt_mpi()
    check_variables()


def check_variables() -> int:
    """Check the launcher variables of this process, and return the number of ranks.

    Raises:
        RefusedInput: the variables contradict each other. The message names variable and fix.
    """
    values = {name: _number(name) for name in _RANKS if name in os.environ}
    if not values:
        return 1
    if len(values) < len(_RANKS):
        missing = ", ".join(name for name in _RANKS if name not in values)
        raise RefusedInput(
            f"{missing} not set, though {', '.join(values)} is: a launcher sets all of them "
            "(deepspeed, torchrun, srun, mpirun); set all or none"
        )
    world_size = values["WORLD_SIZE"]
    if world_size < 1 or values["RANK"] >= world_size:
        raise RefusedInput(
            f"RANK {values['RANK']} of WORLD_SIZE {world_size}: ranks go from 0 to WORLD_SIZE - 1"
        )
    if world_size == 1:
        return 1
    local_name = next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in os.environ), None)
    if local_name is None:
        raise RefusedInput(
            "LOCAL_WORLD_SIZE is not set: set it to the number of ranks on this machine"
        )
    local_size = _number(local_name)
    if not values["LOCAL_RANK"] < local_size <= world_size:
        raise RefusedInput(
            f"LOCAL_RANK {values['LOCAL_RANK']} of {local_name} {local_size}, with WORLD_SIZE "
            f"{world_size}: they contradict each other"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise RefusedInput(f"{name} is not set: {world_size} ranks cannot find each other")
    if not 0 < _number("MASTER_PORT") < 65_536:
        raise RefusedInput(
            f"MASTER_PORT {os.environ['MASTER_PORT']} is not a port: expected 1 to 65535"
        )
    return world_size


def rank() -> int:
    """Return the rank of this process; 0 if the environment has no valid rank."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() else 0


def _number(name: str) -> int:
    """Read an environment variable that holds an integer of 0 or more."""
    value = os.environ.get(name)
    if value is None:
        raise RefusedInput(f"{name} is not set, though the launcher's other variables are")
    if not value.isdecimal():
        raise RefusedInput(f"{name}={value!r}: expected a number, 0 or more")
    return int(value)


def _adopt_mpi() -> None:
    """Set PyTorch's launcher variables from MPI's, if `mpirun` started several processes.

    Raises:
        RefusedInput: MPI's variables are incomplete, or ranks on several nodes have no MASTER_ADDR.
    """
    sizes = {names[2]: _number(names[2]) for names in _MPI if names[2] in os.environ}
    several = [name for name, size in sizes.items() if size > 1]
    if not several or "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    names = next((names for names in _MPI if all(name in os.environ for name in names)), None)
    if names is None:
        raise RefusedInput(
            f"{several[0]} is {sizes[several[0]]}: MPI started several processes, but does not "
            "tell their ranks on the node; set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, "
            "or start with deepspeed, torchrun or srun"
        )
    rank, local_rank, size, local_size = map(_number, names)
    if "MASTER_ADDR" not in os.environ:
        if local_size != size:
            raise RefusedInput(
                "MASTER_ADDR is not set: mpirun started ranks on several nodes, which connect to "
                "the first node; set MASTER_ADDR to its name (mpirun -x MASTER_ADDR=...)"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    job = next((os.environ[name] for name in _MPI_JOB if name in os.environ), "")
    port = _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS  # equal on all ranks of a job
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local_size),
    }


def adopt_srun_step() -> None:
    """Set PyTorch's launcher variables from SLURM's, if `srun` started several tasks.

    Variables that another launcher has set are kept. Only the SLURM step of this process counts. In
    an `sbatch` script or a shell of `salloc`, a plain `python train.py` therefore stays a single
    rank, even if the job has several tasks.

    Raises:
        RefusedInput: the step runs on several nodes and MASTER_ADDR is not set, or SLURM's
            variables are incomplete.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in os.environ else 1
    if tasks == 1 or "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    node = _number("SLURM_NODEID")
    tasks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    adopted = {
        "RANK": str(_number("SLURM_PROCID")),
        "LOCAL_RANK": str(_number("SLURM_LOCALID")),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks_on_node(tasks_per_node, node)),
    }
    if "MASTER_ADDR" not in os.environ:
        if _number("SLURM_STEP_NUM_NODES") != 1:
            raise RefusedInput(
                "MASTER_ADDR is not set: srun started ranks on several nodes, which connect to the "
                "first node; set it as slurm/train.sh does"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + _number("SLURM_JOB_ID") % _PORTS))
    os.environ |= adopted


def free_port(*beside: int) -> int:
    """Find a free port of this machine.

    The port is outside the range from which the system assigns ports. Otherwise, an outgoing
    connection could take it before it is used.

    Args:
        beside: offsets of additional ports that must also be free.
    """
    draw = random.SystemRandom()  # with a seed, two processes would draw the same ports
    while True:
        port = draw.randrange(_FIRST_PORT, _FIRST_PORT + _PORTS - max(beside, default=0))
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in (port, *(port + distance for distance in beside)):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Return the number of tasks on node `node`. SLURM writes `2(x3),1` for 2, 2, 2, 1."""
    for group in tasks_per_node.split(","):
        written = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group)
        if written is None:
            raise RefusedInput(f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r} can't be read")
        count = int(written[2] or 1)
        if node < count:
            return int(written[1])
        node -= count
    raise RefusedInput(f"SLURM_STEP_TASKS_PER_NODE {tasks_per_node} does not reach the last node")


def stop_at_once_on_signals() -> None:
    """End the process with the exit code of a clean stop on SIGTERM, SIGUSR1 and Ctrl-C.

    Until the engine installs its own handlers, there is no work to lose. Without this handler, the
    signal would kill the process, which would count as a failure.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    os._exit(exit_codes.REQUEUE)


def end_process(exit_code: int) -> NoReturn:
    """End the process without shutting the interpreter down.

    DeepSpeed keeps the process groups, so gloo's threads are never joined. If such a thread
    requests the GIL during the shutdown, it aborts the process (`terminate called without an active
    exception`), and a successful run would count as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
