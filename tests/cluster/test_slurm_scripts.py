"""The scripts themselves: shellcheck, the array job, and what ranks make of SLURM's variables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from slurm_cluster import SlurmCluster, wait_for

SCRIPTS = sorted((tiny_runs.REPO / "slurm").glob("*.sh"))


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    scripts = [str(path) for path in (*SCRIPTS, tiny_runs.REPO / ".ci" / "run")]
    command = [tool, "--external-sources", *scripts]
    done = subprocess.run(command, cwd=tiny_runs.REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slurm
def test_an_array_job_makes_the_bytes_of_one_process(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Two parts, each on a node of its own; whichever ends last merges."""
    images = tmp_path / "images"
    images.mkdir()
    for record in tiny_runs.records("shapes"):
        (images / f"{record.id}.png").write_bytes(record.image)
        (images / f"{record.id}.txt").write_text(record.caption)
    options = ["--pairs-per-chunk", "8", "--shard-size", "8kb"]
    alone, array = tmp_path / "alone", tmp_path / "array"
    tool = str(tiny_runs.REPO / "tools" / "prepare_data.py")
    subprocess.run([sys.executable, tool, "folder", str(images), str(alone), *options], check=True)
    job = slurm.run(
        "sbatch", "--parsable", "--array=0-1", "--cpus-per-task=4", "--mem=0",
        f"--output={tmp_path}/%a.log", str(tiny_runs.REPO / "slurm" / "prepare_data.sh"),
        "folder", str(images), str(array), *options,
        REPO=str(tiny_runs.REPO), PYTHON=sys.executable, SCRATCH=str(tmp_path),
    ).strip()  # fmt: skip

    def states() -> list[str]:
        shown = slurm.run("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [line.split("JobState=")[1].split()[0] for line in shown]

    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    wait_for(lambda: states() == ["COMPLETED"] * 2 or "FAILED" in states(), f"both tasks {logs}")
    assert states() == ["COMPLETED"] * 2
    names = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(array) for path in array.rglob("*") if path.is_file())
    for name in names:
        assert (array / name).read_bytes() == (alone / name).read_bytes(), name
    shown = slurm.run("scontrol", "show", "job", "--oneliner", job)
    assert {"NodeList=n1", "NodeList=n2"} <= set(shown.split())


_ASK = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from blip_scale import launcher
launcher.adopt_srun_step()
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
print(json.dumps([os.environ.get(name) for name in names]))
"""


@pytest.mark.slurm
def test_ranks_in_steps_shells_and_scripts(slurm: SlurmCluster) -> None:
    """Two tasks on the first node and one on the second are ranks 0, 1, 2. One task of srun, and
    plain Python in an allocation, is one rank, whatever the allocation could hold."""
    ask = [sys.executable, "-c", _ASK, str(tiny_runs.REPO)]
    meeting = {"MASTER_ADDR": "127.0.0.1"}

    def answers(*command: str, **environment: str) -> list[list[str | None]]:
        said = slurm.run(*command, *ask, **environment)
        return sorted(json.loads(line) for line in said.splitlines() if line.startswith("["))

    three = ("--nodes=2", "--ntasks=3", "--distribution=block")
    assert answers("srun", *three, "--ntasks-per-node=2", **meeting) == [
        ["0", "0", "3", "2"],
        ["1", "1", "3", "2"],
        ["2", "0", "3", "1"],
    ]
    none = [[None] * 4]
    assert answers("srun", "--nodes=1", "--ntasks=1") == none
    assert answers("salloc", "--nodes=2", "--ntasks=3") == none
    assert answers("salloc", "--nodes=2", "--ntasks=3", "srun", "--ntasks=1", "--nodes=1") == none
    given = {"RANK": "5", "WORLD_SIZE": "8"}
    assert answers("srun", "--ntasks=2", **given) == [["5", None, "8", None]] * 2
    with pytest.raises(RuntimeError, match="MASTER_ADDR is not set: srun started ranks on several"):
        answers("srun", *three)
