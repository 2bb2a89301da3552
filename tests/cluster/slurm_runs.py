"""Training jobs of a tiny BLIP on the two-node SLURM, by the scripts that users submit."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quick_rank
import tiny_runs
from s3_server import S3Server
from slurm_cluster import SlurmCluster, wait_for

REPO = tiny_runs.REPO
EVERY_STEPS = 3
ONE_A_NODE = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--nodes=2")


@dataclass(frozen=True)
class Job:
    """A job and the run that it trains."""

    cluster: SlurmCluster
    number: str
    folder: Path

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.folder / "run"

    def starts(self) -> int:
        """Number of times that training started.

        At that time, the log holds no steps after the one from which training resumes.
        """
        return self.rank_log().count("trainable parameters")

    def step(self) -> int:
        """Newest step in the log."""
        file = self.run / "metrics.jsonl"
        logged = re.findall(r'"step": (\d+),', file.read_text()) if file.exists() else []
        return int(logged[-1]) if logged else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is done by an attempt that is still running."""
        wait_for(lambda: self.step() >= step, f"step {step}\n{self.output()}")

    def newest_checkpoint(self) -> int:
        """Step of the newest committed checkpoint; 0 without one."""
        names = [path.name for path in self.run.glob("checkpoints/step_????????")]
        return max([0, *(int(name.removeprefix("step_")) for name in names)])

    def wait_for_line(self, text: str) -> None:
        """Wait until the log of the job has a text."""
        wait_for(lambda: text in self.cluster.log_of(self.number), f"{text}\n{self.output()}")

    def resumed_at(self) -> list[int]:
        """Steps from which the run resumed, in order."""
        return [int(step) for step in re.findall(r"resuming at step (\d+)", self.rank_log())]

    def rank_log(self) -> str:
        """Log of rank 0."""
        file = self.run / "logs" / "rank_0.log"
        return file.read_text() if file.exists() else ""

    def output(self) -> str:
        """Output of the batch script and the tasks, for a failing test."""
        tasks = [f.read_text()[-3000:] for f in sorted(self.run.glob("logs/task_*.log"))]
        return "\n".join([self.cluster.log_of(self.number), *tasks])


def submit(
    cluster: SlurmCluster,
    script: str,
    folder: Path,
    *settings: str,
    options: tuple[str, ...] = (),
    **environment: str,
) -> Job:
    """Submit `slurm/SCRIPT` with the recipe in `folder`, for one rank per node, on the CPU.

    Args:
        cluster: cluster to submit to.
        script: name of the script in slurm/.
        folder: folder filled by `make_recipe`; the run and the job's log are added to it.
        settings: arguments of the script.
        options: further options of sbatch.
        environment: further environment variables of the job.
    """
    defaults = {
        "RECIPE": str(folder / "recipe.yaml"), "OUTPUT_DIR": str(folder / "run"),
        "REPO": str(REPO), "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    number = cluster.run(
        "sbatch", "--parsable", f"--output={folder}/%x_%j.log", *ONE_A_NODE, *options,
        str(REPO / "slurm" / script), *settings, **(defaults | environment),
    ).strip()  # fmt: skip
    return Job(cluster, number, folder)


def submit_quick(cluster: SlurmCluster, folder: Path, *settings: str, **environment: Any) -> Job:
    """Submit a job whose ranks have no network (`quick_rank`) and need no `GPUs`.

    Args:
        cluster: cluster to submit to.
        folder: folder for the run and the job's log.
        settings: arguments of the ranks.
        environment: as for `submit`, with its `options`.
    """
    options = ("--gpus-per-node=0", *environment.pop("options", ()))
    rank = f"{sys.executable} {quick_rank.__file__}"
    return submit(
        cluster, "pretrain_14M.sh", folder, *settings, options=options, TRAIN=rank, **environment
    )


def make_recipe(folder: Path, s3: S3Server, steps: int, workers: int = 0) -> Path:
    """Write a recipe that reads from a bucket, with a separate cache for each node."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_runs.make_recipe(folder)
    remote = s3.upload(folder / "shapes")
    cache = str(folder / "cache-${SLURMD_NODENAME}")
    stream = {"name": "shapes", "local": cache, "remote": remote}
    return tiny_runs.make_recipe(
        folder,
        data={"streams": [stream], "workers": workers},
        train={"max_steps": steps},
        checkpoint={"every_steps": EVERY_STEPS, "keep_last": 2},
    )
