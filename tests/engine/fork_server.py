"""Ranks of the tiny runs that begin with everything imported: forked from a warm process.

A rank is a process of its own that runs the script as `__main__`, with its own arguments,
environment, output, signals and exit code; only the imports were done before, by the server. What a
fork leaves alike in all ranks is the seed of Python's hashes: the runs that tests start by the
`deepspeed` command begin as fresh interpreters and keep that covered.

There is one server to a test process, from the first start to the end:

    test process -- server -- keeper -- rank

The keeper waits for its rank and tells the test process how it ended. Each goes with the one before
it, so that no rank outlives the tests, whatever kills them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent.parent
WARM = (
    "blip_scale.train", "blip_scale.engine", "blip_scale.tasks",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which DeepSpeed imports when it starts
)  # fmt: skip
READ_LATE = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "AWS_", "S3_", "PYTEST_",
)  # fmt: skip
"""Beginnings of the names of variables that no import reads: they may differ from rank to rank."""
_PR_SET_PDEATHSIG = 1
_LONGEST_REQUEST = 1 << 20


class ForkedProcess:
    """A rank, with what tests use of `subprocess.Popen`."""

    def __init__(self, reports: IO[bytes]) -> None:
        self._reports = reports  # unbuffered: select() asks the pipe
        self.pid = self._report()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, that of a signal negative; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended.

        Raises subprocess.TimeoutExpired when it has not within `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._reports], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"rank of pid {self.pid}", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._report())
            self._reports.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _report(self) -> int:
        line = self._reports.readline()
        if not line:
            raise RuntimeError("the fork server or the keeper of a rank has died")
        return int(line)


class ForkServer:
    """A process that has imported `WARM` and forks on request."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = _without_late(environment)
        self._requests, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other_end:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other_end.fileno())],
                env=self._environment, pass_fds=[other_end.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def start(
        self, command: list[str], environment: dict[str, str], folder: Path, output: IO[Any]
    ) -> ForkedProcess | subprocess.Popen[bytes]:
        """Run a Python script as `subprocess.Popen` would.

        It is a fresh interpreter where a variable that imports may read is not as in the server.

        Args:
            command: script and arguments, without the interpreter.
            environment: all its variables.
            folder: its working folder.
            output: takes its stdout and stderr.
        """
        if _without_late(environment) != self._environment:
            command = [sys.executable, *command]
            return subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, cwd=folder
            )
        request = {"command": command, "environment": environment, "folder": str(folder)}
        read_end, write_end = os.pipe()
        files = [output.fileno(), write_end]
        socket.send_fds(self._requests, [json.dumps(request).encode()], files)
        os.close(write_end)
        return ForkedProcess(os.fdopen(read_end, "rb", buffering=0))


def _without_late(environment: dict[str, str]) -> dict[str, str]:
    return {name: v for name, v in environment.items() if not name.startswith(READ_LATE)}


def _serve(requests: socket.socket) -> str:
    """Fork a keeper for every request; comes back in the rank alone, with the script to run."""
    own = os.getpid()
    while True:
        message, files, *_ = socket.recv_fds(requests, _LONGEST_REQUEST, 2)
        if not message:  # the test process is gone
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            _die_with(own)
            return _keep(json.loads(message), *files)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):  # there is no keeper
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _keep(request: dict[str, Any], output: int, reports: int) -> str:
    """Fork the rank, say its pid and how it ended; comes back in the rank alone."""
    own = os.getpid()
    rank = os.fork()
    if rank == 0:
        os.close(reports)
        _die_with(own)
        return _become(request, output)
    os.write(reports, b"%d\n" % rank)
    os.write(reports, b"%d\n" % os.waitpid(rank, 0)[1])
    os._exit(0)


def _become(request: dict[str, Any], output: int) -> str:
    """Be what a fresh interpreter would be; gives the script."""
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    np.random.seed()  # Python's own generator does so after a fork; torch's begins with a constant
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    return sys.argv[0]


def _die_with(parent: int) -> None:
    """Be killed when the parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _warm_up() -> None:
    sys.path.insert(0, str(REPO))
    for module in WARM:
        importlib.import_module(module)
    del sys.path[0]
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, "a library started threads, which a fork would lack: OMP_NUM_THREADS=1?"
    gc.freeze()  # or each child's first collection would copy all that was imported


if __name__ == "__main__":
    _warm_up()
    runpy.run_path(_serve(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__")
