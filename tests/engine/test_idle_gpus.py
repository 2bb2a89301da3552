"""A run is refused if torch can't see the machine's GPUs, unless the user chose the CPU."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from blip_scale.engine.idle_gpus import refuse_idle_gpus
from blip_scale.errors import RefusedInput

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar 4 2025\nGCC version: 12\n"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove environment variables of this machine that affect the check."""
    for name in (
        "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS",
        "SLURM_GPUS_ON_NODE", "PBS_GPUFILE",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def node(root: Path, driver: str | None = "550.54.15", devices: int = 1) -> Path:
    """Create the files that the GPU driver makes on a node."""
    (root / "dev").mkdir()
    for index in range(devices):
        (root / "dev" / f"nvidia{index}").touch()
    (root / "dev" / "nvidiactl").touch()
    if driver:
        gpus = root / "proc/driver/nvidia/gpus/0000:00:1e.0"
        gpus.mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(VERSION.format(driver))
    return root


@pytest.mark.parametrize(
    ("driver", "advice"),
    [
        ("580.65.06", "whl/cu130"),
        ("550.54.15", "whl/cu126"),
        ("470.82.01", "update it to 525 or newer"),
        (None, "the driver is not loaded: load the driver, or ask for a container"),
    ],
)
def test_the_driver_gives_them_away(tmp_path: Path, driver: str | None, advice: str) -> None:
    with pytest.raises(RefusedInput, match=r"this machine has GPUs \(/dev/nvidia0") as refused:
        refuse_idle_gpus(node(tmp_path, driver))
    message = str(refused.value)
    assert advice in message
    assert f"torch {torch.__version__}" in message
    assert (torch.version.cuda or "without CUDA") in message
    assert driver is None or f"the driver is {driver}" in message


@pytest.mark.parametrize("name", ["SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"])
def test_the_allocation_gives_them_away(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(RefusedInput, match=rf"\({name}=2\)"):
        refuse_idle_gpus(tmp_path)


def test_nvidia_smi_gives_them_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in -L) echo "GPU 0: NVIDIA H200 (UUID: GPU-1)";; '
        "*) echo 570.86.15;; esac\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    message = r"\(nvidia-smi -L\).* the driver is 570.86.15: .*cu126"
    with pytest.raises(RefusedInput, match=message):
        refuse_idle_gpus(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")],
)
def test_who_chose_the_cpu_may_have_it(
    tmp_path: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    refuse_idle_gpus(node(tmp_path))


def test_a_machine_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login node may have the driver's package, and SLURM may allocate 0 GPUs."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    refuse_idle_gpus(node(tmp_path, driver=None, devices=0))
