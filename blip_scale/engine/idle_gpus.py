"""Refusal of machines whose GPUs torch doesn't see: a run would train on the CPU for days."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from blip_scale.errors import RefusedInput

_ALLOCATION = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "PBS_GPUFILE")
"""Variables that a scheduler sets for a job with GPUs."""
_HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU on purpose."""
_WHEELS = ((580, "cu130"), (525, "cu126"))
"""Lowest major version of the driver -> wheel of torch that runs with it."""


def refuse_idle_gpus(root: Path = Path("/")) -> None:
    """Refuse to train on the CPU of a machine with GPUs.

    Nothing is refused if torch sees a GPU, if the user chose the CPU (`DS_ACCELERATOR=cpu`), or if
    the user hid the GPUs (`CUDA_VISIBLE_DEVICES=`).

    Args:
        root: root of the file system in which the driver is looked for.

    Raises:
        RefusedInput: the machine has GPUs that torch can't use. The message names torch's CUDA
            version, the driver, and the wheel to install.
    """
    is_chosen = os.environ.get("DS_ACCELERATOR") == "cpu"
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN
    if torch.cuda.is_available() or is_chosen or is_hidden:
        return
    signs = list(_signs(root))
    if not signs:
        return
    driver = _driver(root)
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    raise RefusedInput(
        f"this machine has GPUs ({', '.join(signs)}), but torch {torch.__version__}, {built}, sees "
        f"none; the driver is {driver or 'not loaded'}: {_advice(driver)}. To train on the CPU "
        "anyway, set DS_ACCELERATOR=cpu"
    )


def _signs(root: Path) -> Iterator[str]:
    """Signs of GPUs in the scheduler's variables, device files, the driver and nvidia-smi."""
    for name in _ALLOCATION:
        value = os.environ.get(name, "")
        if value not in ("", "0"):
            yield f"{name}={value}"
    devices = [file for file in (root / "dev").glob("nvidia*") if file.name[6:].isdigit()]
    if devices:
        yield f"/dev/{min(file.name for file in devices)}"
    gpus = root / "proc/driver/nvidia/gpus"
    if gpus.is_dir() and any(gpus.iterdir()):
        yield "/proc/driver/nvidia/gpus"
    tool = shutil.which("nvidia-smi")
    if tool and "GPU 0" in _output(tool, "-L"):
        yield "nvidia-smi -L"


def _driver(root: Path) -> str | None:
    """Version of NVIDIA's driver; None if none is loaded."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        tool = shutil.which("nvidia-smi")
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        text = f"Module {_output(tool, *query)}" if tool else ""
    match = re.search(r"Module\D*(\d+(?:\.\d+)+)", text)
    return match[1] if match else None


def _advice(driver: str | None) -> str:
    if driver is None:
        return "load the driver, or ask for a container with GPUs (docker run --gpus all)"
    major = int(driver.partition(".")[0])
    wheel = next((wheel for least, wheel in _WHEELS if major >= least), None)
    if wheel is None:
        return f"update it to {_WHEELS[-1][0]} or newer"
    return (
        f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{wheel}"
    )


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
