"""Start loader workers from Python's fork server, and end them with their rank.

A rank has threads of gloo, NCCL and TensorBoard. Forking the rank would copy the locks that these
threads hold, but not the threads that release them, so a worker could hang, and the run with it.
The fork server has one thread and holds no locks. It imports the modules before it forks.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from pathlib import Path

logger = logging.getLogger(__name__)

CONTEXT = "forkserver"
_ROOT = Path(__file__).resolve().parents[3]
_OF_THE_RANK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_OF_A_WORKER = signal.SIGUSR2
"""Makes a worker log its stacks. Blocked until its handler is set, as it would kill the worker."""


def start_server() -> None:
    """Start the fork server. It imports the loader's modules in the background.

    SIGTERM from a launcher, SIGUSR1 from SLURM and Ctrl-C also reach the server and the workers.
    The rank still needs their batches to stop cleanly, so these signals are blocked in them from
    the start.
    """
    multiprocessing.get_context(CONTEXT).set_forkserver_preload(["blip_scale.data.loading.loader"])
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        with _environment(), _blocked():  # both in the loop: starting the tracker unblocks signals
            start()


def begin(environment: dict[str, str], set_up: Callable[[], object] | None, worker: int) -> None:
    """Set up a worker before its first batch (DataLoader's `worker_init_fn`).

    Args:
        environment: the rank's environment variables. They may have changed since the server's
            start.
        set_up: called in the worker, to configure its logging.
        worker: index of the worker.
    """
    os.environ.clear()
    os.environ.update(environment)
    Queue._on_queue_feeder_error = staticmethod(_end_with_feeder)  # type: ignore[attr-defined]
    end_with_parent()  # the worker's parent is the server, which outlives a killed rank
    if set_up is not None:
        set_up()


def _end_with_feeder(error: BaseException, batch: object) -> None:
    """End the worker, because the batch that its feeder thread could not send is lost.

    This function replaces `Queue._on_queue_feeder_error`, which prints a traceback and continues,
    so the rank would wait forever for the batch. The loader restarts a worker that ended. After
    several deaths in a row, the run stops with an error.
    """
    logger.error("a batch could not be sent to the rank: %s: %s", type(error).__name__, error)
    os._exit(1)


def end_with_parent() -> None:
    """End this process as soon as its parent ends for any reason."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Context manager that sets environment variables for the server and the resource tracker.

    PYTHONPATH lets them find this package. Before Python 3.13 the server does not get the rank's
    sys.path, so each worker would repeat all imports. PYTHONWARNINGS silences the tracker's report
    of leaks when it cleans up after a killed rank.
    """
    added = {"PYTHONPATH": str(_ROOT), "PYTHONWARNINGS": "ignore:resource_tracker"}
    before = {name: os.environ.get(name) for name in added}
    for name, separator in (("PYTHONPATH", os.pathsep), ("PYTHONWARNINGS", ",")):
        os.environ[name] = separator.join(filter(None, [before[name], added[name]]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Context manager that blocks the rank's signals. Processes started inside inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*_OF_THE_RANK, _OF_A_WORKER])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
