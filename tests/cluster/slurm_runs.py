"""Training jobs of a tiny BLIP on the two-node SLURM, by the scripts that users submit."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        """How often training began: the log then holds nothing past the step that it goes on
        from."""
        return self.rank_log().count("trainable parameters")

    def step(self) -> int:
        """Newest step in the log."""
        file = self.run / "metrics.jsonl"
        found = re.findall(r'"step": (\d+),', file.read_text()) if file.exists() else []
        return int(found[-1]) if found else 0

    def wait_for_step(self, step: int) -> None:
        """Until a step was done, in an attempt that still runs."""
        wait_for(lambda: self.step() >= step, f"step {step}\n{self.said()}")

    def newest_checkpoint(self) -> int:
        """Step of the newest committed checkpoint; 0 without one."""
        names = [path.name for path in self.run.glob("checkpoints/step_????????")]
        return max([0, *(int(name.removeprefix("step_")) for name in names)])

    def resumed_at(self) -> list[int]:
        """The step of every start but those without a checkpoint."""
        return [int(step) for step in re.findall(r"resuming at step (\d+)", self.rank_log())]

    def rank_log(self) -> str:
        """What rank 0 wrote to its file."""
        file = self.run / "logs" / "rank_0.log"
        return file.read_text() if file.exists() else ""

    def said(self) -> str:
        """What the batch script and the tasks said, for a test that fails."""
        tasks = [f.read_text()[-3000:] for f in sorted(self.run.glob("logs/task_*.log"))]
        return "\n".join([self.cluster.said(self.number), *tasks])


def submit(
    cluster: SlurmCluster,
    script: str,
    folder: Path,
    *settings: str,
    options: tuple[str, ...] = (),
    **environment: str,
) -> Job:
    """`sbatch slurm/SCRIPT` with the recipe in `folder`, one rank a node, on the CPU.

    Args:
        cluster: where to.
        script: name of the script in slurm/.
        folder: what `make_recipe` filled; takes the run and the log of the job.
        settings: arguments of the script.
        options: further options of sbatch.
        environment: further variables of the job.
    """
    given = {
        "RECIPE": str(folder / "recipe.yaml"), "OUTPUT_DIR": str(folder / "run"),
        "REPO": str(REPO), "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    number = cluster.run(
        "sbatch", "--parsable", f"--output={folder}/%x_%j.log", *ONE_A_NODE, *options,
        str(REPO / "slurm" / script), *settings, **(given | environment),
    ).strip()  # fmt: skip
    return Job(cluster, number, folder)


def make_recipe(folder: Path, s3: S3Server, steps: int, **changes: Any) -> Path:
    """A recipe that reads from a bucket, each node through a cache of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_runs.make_recipe(folder)
    remote = s3.upload(folder / "shapes")
    cache = str(folder / "cache-${SLURMD_NODENAME}")
    return tiny_runs.make_recipe(
        folder,
        data={"streams": [{"name": "shapes", "local": cache, "remote": remote}], "workers": 1},
        train={"max_steps": steps},
        checkpoint={"every_steps": EVERY_STEPS, "keep_last": 2},
        **changes,
    )
