"""Fork the ranks of the tiny runs from a process that has already imported all modules.

A rank is a separate process that runs the script as `__main__`, with its own arguments,
environment, output, signals and exit code. Only its imports are shared: the server made them.

All forked ranks have the same hash seed of Python. Runs started with the `deepspeed` command are
new interpreters, so they cover different seeds.

Each test process has one server, from its first rank to its end:

    test process -- server -- keeper -- rank

The keeper waits for its rank, and reports its exit code to the test process. Each process is
killed when its parent ends, so no rank outlives the tests, even if the tests are killed.
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
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent.parent
WARM = (
    "blip_scale.train", "blip_scale.engine.loop", "blip_scale.tasks.by_name",
    "blip_scale.engine.watching.loggers.tensorboard",
    "transformers.models.auto.tokenization_auto",  # reads all of transformers' model files
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it when it starts
)  # fmt: skip
READ_LATE = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "GLOO_", "NCCL_", "AWS_",
    "S3_", "PYTEST_", "CXX", "TORCH_EXTENSIONS_DIR", "PATH", "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip
"""Prefixes of environment variables that may differ between ranks, because no import reads them.
CXX is an exception: Inductor reads it when it is imported, so tests that set CXX compile no blocks.
GLOO_, NCCL_ and the last three are left behind by tools that ran in the test process."""
_PR_SET_PDEATHSIG = 1
_LONGEST_REQUEST = 1 << 20


class ForkedProcess:
    """A rank, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, reports: IO[bytes]) -> None:
        self._reports = reports  # unbuffered, because select() polls the pipe
        self.pid = self._report()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (negative for a signal), or None while the rank runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the rank to end, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: the rank did not end within `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._reports], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"rank of pid {self.pid}", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._report())
            self._reports.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the rank, unless it has ended."""
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
    """A process that has imported `WARM`, and forks ranks on request."""

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
        """Run a Python script like `subprocess.Popen`.

        The rank is forked, unless an environment variable that imports may read differs from the
        server's. In that case a warning names the variables, and a new interpreter is started,
        which takes five seconds longer. It can also import the packages of the repository.

        Args:
            command: script and arguments, without the interpreter.
            environment: all variables of the process.
            folder: working directory of the process.
            output: file for its stdout and stderr.
        """
        differing = dict(_without_late(environment).items() ^ self._environment.items())
        if differing:
            warnings.warn(f"new interpreter for {command[0]}: {sorted(differing)}", stacklevel=2)
            command = [sys.executable, *command]
            path = [str(REPO), *filter(None, [environment.get("PYTHONPATH")])]
            environment = environment | {"PYTHONPATH": os.pathsep.join(path)}
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
    """Fork a keeper for every request. Return only in the rank, with the script to run."""
    server = os.getpid()
    while True:
        message, files, *_ = socket.recv_fds(requests, _LONGEST_REQUEST, 2)
        if not message:  # the test process has ended
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            _die_with(server)
            return _keep(json.loads(message), *files)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):  # no keeper is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _keep(request: dict[str, Any], output: int, reports: int) -> str:
    """Fork the rank, and report its pid and its exit code. Return only in the rank."""
    keeper = os.getpid()
    rank = os.fork()
    if rank == 0:
        os.close(reports)
        _die_with(keeper)
        return _become(request, output)
    os.write(reports, b"%d\n" % rank)
    os.write(reports, b"%d\n" % os.waitpid(rank, 0)[1])
    os._exit(0)


def _become(request: dict[str, Any], output: int) -> str:
    """Set up this process like a new interpreter, and return the script to run."""
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    np.random.seed()  # Python reseeds its generator after a fork; torch's has a constant seed
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    return sys.argv[0]


def _die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends."""
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
    gc.freeze()  # otherwise the first collection in each child would copy all imported objects


if __name__ == "__main__":
    _warm_up()
    runpy.run_path(_serve(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__")
