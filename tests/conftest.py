"""Environment variables for all tests (quiet, offline, one thread per process), and the fixture
for the train command."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A run of one rank uses all cores. If waiting threads spin instead of sleeping, two concurrent runs
# take 13 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Each process of Inductor's compile pool would import torch, which costs more than it saves here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# If pandas is installed (gradio needs it), transformers imports it, and pandas imports Arrow.
# Arrow's allocator would start a thread, but the fork server must have only one thread.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")

REPO = Path(__file__).resolve().parent.parent

Command = Callable[..., subprocess.CompletedProcess[str]]

LONGEST = (
    "cluster/test_slurm_run.py", "engine/test_parity.py", "cluster/test_slurm_recovery.py",
    "test_benchmark.py", "test_gpu_report.py", "cluster/test_slurm_signals.py",
    "cluster/test_reading_from_s3.py", "engine/test_resume.py", "cluster/test_training_from_s3.py",
    "test_installed.py", "cluster/test_slurm_ends.py", "engine/test_deepspeed_settings.py",
    "engine/test_run.py", "engine/test_planned_memory.py",
)  # fmt: skip
"""Test files that take a minute or more. They run first, so that none of them runs alone at the
end. Files that wait for SLURM alternate with files that compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of `LONGEST` to the front. The order of the others does not change."""
    ranks = {REPO / "tests" / name: rank for rank, name in enumerate(LONGEST)}
    assert all(file.is_file() for file in ranks), "a file of LONGEST was renamed"
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(autouse=True)
def _environment_after_a_test() -> Iterator[None]:
    """Restore the environment after each test.

    A tool that runs in this process joins a process group, and leaves the group's address in the
    environment. A later run would try to join the same group.
    """
    with _environment_restored():
        yield


@pytest.fixture(autouse=True, scope="module")
def _environment_after_a_module() -> Iterator[None]:
    """Restore the environment after each module, because its fixtures also run tools."""
    with _environment_restored():
        yield


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def train() -> Command:
    """Return a function that runs `python blip_scale/train.py ARGUMENTS...` to its end.

    The function returns the completed process. Its keywords are `cwd`, `script`, `timeout_s`, and
    environment variables by name (None removes one).
    """

    def run(
        *arguments: str,
        cwd: Path = REPO,
        script: Path = REPO / "blip_scale" / "train.py",
        timeout_s: float = 60,
        **environment: str | None,
    ) -> subprocess.CompletedProcess[str]:
        merged = {**os.environ, **environment}
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            cwd=cwd,
            env={name: value for name, value in merged.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escape lone surrogates in test reports, because a pytest-xdist worker cannot send them.

    A report contains the log and the output of its test. Tests with hostile texts print lone
    surrogates.
    """
    return _without_surrogates((yield))


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {
            _without_surrogates(name): _without_surrogates(entry) for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(map(_without_surrogates, value))
    return value
