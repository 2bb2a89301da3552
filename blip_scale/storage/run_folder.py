"""Names of the files and folders inside the `output_dir` of a run.

Imports the standard library alone: slurm/requeue.py runs on a Python without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

RECIPE = "recipe.yaml"
"""The resolved recipe."""
SUMMARY = "summary.json"
"""Figures of a finished run."""
METRICS = "metrics.jsonl"
"""One line a logged step."""
HEARTBEAT = "heartbeat.json"
LOCK = "lock.json"
"""The run that owns the folder, while it is under way."""
RUN_MANIFEST = "manifest.json"
"""What the run was made from, its starts and its checkpoints."""
ATTEMPTS = "attempts.json"
"""Starts of a SLURM job and how they ended."""
FAILURE_REPORT = "failure_report.txt"
"""Why a SLURM job isn't started again."""
TEXT = "text"
"""Tokenizer and sizes of the text stack: a run's folder can be asked on another machine."""
LOGS = "logs"
SAMPLES = "samples"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
LOG_PATTERN = "*.log"
"""All files in `LOGS`."""
SAMPLES_PATTERN = "rank_*.jsonl"
"""All files in `SAMPLES`."""

_STEP = re.compile(r"step_(\d{8})")


def log_of(rank: int) -> str:
    """Path of a rank's log in the run's folder."""
    return f"{LOGS}/rank_{rank}.log"


def samples_of(rank: int) -> str:
    """Name of a rank's file in `SAMPLES`."""
    return f"rank_{rank}.jsonl"


def rank_of_samples(name: str) -> int | None:
    """The rank whose file in `SAMPLES` has this name; None for another file."""
    match = re.fullmatch(r"rank_(\d+)\.jsonl", name)
    return int(match[1]) if match else None


def step_folder(step: int) -> str:
    """Name of a step's folder in `CHECKPOINTS`."""
    return f"step_{step:08d}"


def steps(names: Iterable[str]) -> list[int]:
    """Steps of the committed checkpoints among some names of folders, oldest first."""
    return sorted({int(match[1]) for name in names if (match := _STEP.fullmatch(name))})
