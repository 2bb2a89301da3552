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
"""Metrics of the logged steps, one JSON object per line."""
METRICS_CSV = "metrics.csv"
"""Metrics of the logged steps as a table, if `log.to` names csv."""
HEARTBEAT = "heartbeat.json"
GOODPUT = "goodput.json"
"""Wall time of a run by its use, over all its starts."""
EVALUATION = "evaluation.json"
"""Results of the newest evaluation, and the checkpoint to which they belong."""
LOCK = "lock.json"
"""Names the run that owns the folder while it is running."""
RUN_MANIFEST = "manifest.json"
"""Versions, hashes and settings behind the run, its starts and its checkpoints."""
ATTEMPTS = "attempts.json"
"""Starts of a SLURM job and how each ended."""
FAILURE_REPORT = "failure_report.txt"
"""Explains why a SLURM job is not requeued."""
STALLS = "stalls.jsonl"
"""Stalls that ended ranks: phase, rank, node, and the ranks that they waited for."""
TEXT = "text"
"""Tokenizer and sizes of the text stack, so that the folder can be used on another machine."""
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
