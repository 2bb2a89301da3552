"""Helpers of the scripts of `benchmark.py scale`: running and extrapolating."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TARGET = 100_000_000
"""Number of records or lines to which the figures are extrapolated."""


def figures_of(script: str, argument: Path) -> dict[str, float]:
    """Run a script on one thread in a new process, and return the figures that it prints."""
    process = subprocess.run(
        [sys.executable, script, str(argument)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    figures: dict[str, float] = json.loads(process.stdout)
    return figures


def extrapolated(figures: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Extrapolate linearly to `TARGET` from the smallest and the largest count."""
    small, large = min(figures), max(figures)
    few, many = figures[small], figures[large]
    beyond = {}
    for name, value in many.items():
        slope = (value - few[name]) / (large - small) if large > small else value / large
        beyond[name] = value + slope * (TARGET - large)
    return beyond


def status_kb(name: str) -> int:
    """Field of /proc/self/status in kB, such as VmHWM (peak resident memory); 0 if missing."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0
