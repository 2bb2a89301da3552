"""The SLURM scripts: shellcheck, the array job, and ranks from SLURM's variables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_blip
import tiny_runs
from slurm_cluster import SlurmCluster, wait_for

from blip_scale.commands import capfilt, prepare_data
from blip_scale.data.shards import write_shards

SCRIPTS = sorted((tiny_runs.REPO / "slurm").glob("*.sh"))


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    scripts = [str(path) for path in (*SCRIPTS, tiny_runs.REPO / ".ci" / "run")]
    command = [tool, "--external-sources", *scripts]
    done = subprocess.run(command, cwd=tiny_runs.REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def run_array(slurm: SlurmCluster, folder: Path, script: str, *arguments: str) -> None:
    """Run an array job of two tasks to its end, each task on a separate node.

    SRUN_ARGS must reach srun.
    """
    job = slurm.run(
        "sbatch", "--parsable", "--array=0-1", "--cpus-per-task=4", "--mem=0",
        f"--output={folder}/%a.log", str(tiny_runs.REPO / "slurm" / script), *arguments,
        REPO=str(tiny_runs.REPO), PYTHON=sys.executable, SCRATCH=str(folder),
        SRUN_ARGS=f"--error={folder}/step_%t.log --unbuffered",
    ).strip()  # fmt: skip

    def states() -> list[str]:
        shown = slurm.run("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [line.split("JobState=")[1].split()[0] for line in shown]

    wait_for(lambda: states() == ["COMPLETED"] * 2 or "FAILED" in states(), "both tasks")
    logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
    assert states() == ["COMPLETED"] * 2, logs
    shown = slurm.run("scontrol", "show", "job", "--oneliner", job)
    assert {"NodeList=n1", "NodeList=n2"} <= set(shown.split())
    assert (folder / "step_0.log").exists()


def assert_same_files(left: Path, other: Path) -> None:
    names = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert (left / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slurm
def test_an_array_job_makes_the_bytes_of_one_process(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Two parts run on separate nodes, and the one that ends last merges."""
    images = tmp_path / "images"
    images.mkdir()
    for record in tiny_runs.records("shapes"):
        (images / f"{record.id}.png").write_bytes(record.image)
        (images / f"{record.id}.txt").write_text(record.caption)
    options = ["--pairs-per-chunk", "8", "--shard-size", "8kb"]
    alone, array = tmp_path / "alone", tmp_path / "array"
    assert prepare_data.main(["folder", str(images), str(alone), *options]) == 0
    run_array(slurm, tmp_path, "prepare_data.sh", "folder", str(images), str(array), *options)
    assert_same_files(alone, array)


@pytest.mark.slurm
def test_capfilt_as_an_array_makes_the_bytes_of_one_process(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    words = tiny_blip.vocabulary(tmp_path / "words" / "vocabulary")
    blip = str(tiny_blip.write_ours(tmp_path / "step_00000007", tiny_blip.config(words), words))
    web, alone, array = tmp_path / "web", tmp_path / "alone", tmp_path / "array"
    write_shards(web, tiny_runs.records("web"), shard_size="4kb")
    options = ["--captioner", blip, "--filter", blip, "--device", "cpu", "--workers", "1"]
    assert capfilt.main([str(web), str(alone), *options]) == 0
    run_array(slurm, tmp_path, "capfilt.sh", str(web), str(array), *options)
    assert_same_files(alone, array)


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
    """Two tasks on the first node and one on the second get ranks 0, 1 and 2.

    One task of srun, or plain Python in an allocation, is one rank, whatever the allocation holds.
    """
    ask = [sys.executable, "-c", _ASK, str(tiny_runs.REPO)]
    meeting = {"MASTER_ADDR": "127.0.0.1"}

    def answers(*command: str, **environment: str) -> list[list[str | None]]:
        output = slurm.run(*command, *ask, **environment)
        return sorted(json.loads(line) for line in output.splitlines() if line.startswith("["))

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
    variables = {"RANK": "5", "WORLD_SIZE": "8"}
    assert answers("srun", "--ntasks=2", **variables) == [["5", None, "8", None]] * 2
    with pytest.raises(RuntimeError, match="MASTER_ADDR is not set: srun started ranks on several"):
        answers("srun", *three)
