"""Loader workers are forked by a server process with the imports, one thread and no locks.

A rank has threads of gloo, NCCL and TensorBoard. A fork copies the locks that they hold, without
the threads that would release them. Now and then a worker would wait for ever, and the run with it.
So workers are forked by Python's fork server.
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
"""Asks for a worker's stacks. Until the worker is set up for it, the signal would end it."""


def start_server() -> None:
    """Start the fork server, which imports what workers need while the rank does other things.

    A launcher's SIGTERM, SLURM's SIGUSR1 or a Ctrl-C reaches it and the workers too. The rank still
    needs their batches to stop cleanly, so the signals are blocked there, from the very start.
    """
    multiprocessing.get_context(CONTEXT).set_forkserver_preload(["blip_scale.data.loading.loader"])
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        with _environment(), _blocked():  # anew, as the first one lets signals in again
            start()


def begin(environment: dict[str, str], set_up: Callable[[], object] | None, worker: int) -> None:
    """Set a worker up, before its first batch.

    Args:
        environment: the variables of the rank, which may have changed since the server's start.
        set_up: called in the worker, to send its log where the rank's goes.
        worker: its number.
    """
    os.environ.clear()
    os.environ.update(environment)
    Queue._on_queue_feeder_error = staticmethod(_end_with_feeder)  # type: ignore[attr-defined]
    end_with_parent()  # the server is still there when the rank is killed
    if set_up is not None:
        set_up()


def _end_with_feeder(error: BaseException, batch: object) -> None:
    """End the worker: a batch that its feeder thread could not send is lost.

    Python's own `Queue._on_queue_feeder_error`, which this replaces, prints a traceback and goes
    on, and the rank would wait for that batch for ever. A worker that ended is started again, and
    if it ends so again and again, the run stops with an error.
    """
    logger.error("a batch could not be handed over: %s: %s", type(error).__name__, error)
    os._exit(1)


def end_with_parent() -> None:
    """End this process as soon as its parent ends, for whatever reason."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Inside, a Python that is started finds this package (before 3.13 the server isn't told the
    rank's path, and each worker would import everything anew), and does not report as leaked what
    it removes after a rank that was killed."""
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
    """Inside, signals for the rank wait; a process that is started inside never sees them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*_OF_THE_RANK, _OF_A_WORKER])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
