"""Which rank this process is when `srun` started it, and what a signal does before the run has
begun.

Every launcher of PyTorch says RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE in the environment.
`srun` says the same in variables of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

from blip_scale.config import exit_codes

_FIRST_PORT, _PORTS = 10_000, 20_000  # below those that systems hand out themselves


def adopt_srun_step() -> None:
    """Set the launcher's variables from SLURM's, where `srun` started several tasks and no launcher
    between it and us has set them.

    What counts is the step that this process belongs to: in an `sbatch` script or a shell of
    `salloc`, whose job has several tasks, a plain `python train.py` stays one rank.

    Raises:
        ValueError: the step is on several nodes and MASTER_ADDR, where they meet, is not set.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    node = int(os.environ["SLURM_NODEID"])
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks_on_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], node)),
    }
    if "MASTER_ADDR" not in os.environ:
        if os.environ["SLURM_STEP_NUM_NODES"] != "1":
            raise ValueError(
                "MASTER_ADDR is not set: srun started ranks on several nodes, and they meet at the "
                "first of them; set it as slurm/train.sh does"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    job = int(os.environ["SLURM_JOB_ID"])
    os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + job % _PORTS))


def free_port(*beside: int) -> int:
    """A port of this machine on which nothing listens, and none at these distances above it.

    Not one that the system hands out: between here and its use an outgoing connection could get it.
    """
    draw = random.SystemRandom()  # a seeded one would give two processes the same ports
    while True:
        port = draw.randrange(_FIRST_PORT, _FIRST_PORT + _PORTS - max(beside, default=0))
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in (port, *(port + distance for distance in beside)):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Number of tasks on the node with this index; SLURM writes `2(x3),1` for 2, 2, 2, 1."""
    for group in tasks_per_node.split(","):
        tasks, _, nodes = group.partition("(x")
        count = int(nodes.rstrip(")") or 1)
        if node < count:
            return int(tasks)
        node -= count
    raise ValueError(f"SLURM_STEP_TASKS_PER_NODE {tasks_per_node} does not reach the last node")


def stop_at_once_on_signals() -> None:
    """Until the engine takes the signals over, nothing has been done that could be lost: end the
    process with the code of a clean stop, instead of by the signal, which would count as a failure.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    os._exit(exit_codes.REQUEUE)


def end_process(exit_code: int) -> NoReturn:
    """End the process without tearing Python down.

    DeepSpeed keeps the process groups, so the threads of gloo are never joined. A thread that asks
    for the interpreter's lock during the teardown aborts the process (`terminate called without an
    active exception`), and a run that went well would count as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
