"""Names of the files and folders inside the `output_dir` of a run.

This module imports only the standard library, because slurm/requeue.py runs without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

RECIPE = "recipe.yaml"
"""The resolved recipe."""
SUMMARY = "summary.json"
"""Results of a finished run."""
METRICS = "metrics.jsonl"
"""Metrics of the logged steps, one JSON object per line."""
METRICS_CSV = "metrics.csv"
"""Metrics of the logged steps as a table, if `log.to` names csv."""
HEARTBEAT = "heartbeat.json"
GOODPUT = "goodput.json"
"""Wall time of a run by use, over all its starts."""
EVALUATION = "evaluation.json"
"""Results of the newest evaluation, with its checkpoint."""
LOCK = "lock.json"
"""Identifies the process that is running in the folder."""
RUN_MANIFEST = "manifest.json"
"""Versions, hashes and settings behind the run, its starts and its checkpoints."""
ATTEMPTS = "attempts.json"
"""Starts of a SLURM job and how each ended."""
FAILURE_REPORT = "failure_report.txt"
"""Explains why a SLURM job is not requeued."""
STALLS = "stalls.jsonl"
"""Stalls that ended ranks: phase, rank, node, and the ranks for which they waited."""
TEXT = "text"
"""Tokenizer and text configuration, which make the folder usable on other machines."""
LOGS = "logs"
SAMPLES = "samples"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
"""Folder of W&B, if `log.to` names wandb."""
WANDB_ID = "run_id.txt"
"""Id of the W&B run, in `WANDB`."""
LOG_PATTERN = "*.log"
"""Glob pattern of the files in `LOGS`."""
SAMPLES_PATTERN = "rank_*.jsonl"
"""Glob pattern of the files in `SAMPLES`."""

_STEP = re.compile(r"step_(\d{8})")


def log_of(rank: int) -> str:
    """Path of a rank's log, relative to the run's folder."""
    return f"{LOGS}/rank_{rank}.log"


def samples_of(rank: int) -> str:
    """Name of a rank's file in `SAMPLES`."""
    return f"rank_{rank}.jsonl"


def rank_of_samples(name: str) -> int | None:
    """Rank whose file in `SAMPLES` has this name, or None for any other file."""
    match = re.fullmatch(r"rank_(\d+)\.jsonl", name)
    return int(match[1]) if match else None


def step_folder(step: int) -> str:
    """Name of a step's folder in `CHECKPOINTS`."""
    return f"step_{step:08d}"


def steps(names: Iterable[str]) -> list[int]:
    """Steps of the committed checkpoints among folder names, oldest first."""
    return sorted({int(match[1]) for name in names if (match := _STEP.fullmatch(name))})
