"""Killed at any moment, a run goes on with the same losses, bit for bit; a bad disk costs nothing
saved."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny_runs

pytestmark = pytest.mark.multiprocess

STEPS = 12
OFTEN = {"checkpoint": {"every_steps": 3}, "train": {"max_steps": STEPS}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Losses of the run that nobody killed, on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny_runs.train(tiny_runs.make_recipe(folder, **OFTEN), 2)
    return tiny_runs.losses(folder / "run")


def kill_after(processes: list[subprocess.Popen], moment: object, victims: slice) -> None:
    """SIGKILL some ranks when `moment()` comes true; the launcher would then end the others."""
    deadline = time.monotonic() + 240
    while not moment():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the moment to kill never came"
        assert all(process.poll() is None for process in processes), (
            "a rank ended before it was killed"
        )
        time.sleep(0.002)
    for process in processes[victims]:
        process.kill()
    for process in processes:
        process.kill()
        process.wait()


def reached(run: Path, step: int) -> bool:
    """Whether the log says that `step` was done."""
    file = run / "metrics.jsonl"
    return file.exists() and f'"step": {step},' in file.read_text()


def test_killed_at_random_moments(tmp_path: Path, undisturbed: dict[int, dict[str, float]]) -> None:
    """One rank, then all ranks, each at a random moment between two steps."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    run = tmp_path / "run"
    dice = random.Random(time.time_ns())
    for step, victims in ((dice.randint(4, 6), slice(0, 1)), (dice.randint(7, 10), slice(0, 2))):
        processes = tiny_runs.launch(recipe, 2)
        delay_s = dice.random() * 0.3
        kill_after(processes, lambda step=step: reached(run, step), victims)
        time.sleep(delay_s)
    tiny_runs.train(recipe, 2)
    assert tiny_runs.losses(run) == undisturbed
    assert "resuming at step" in tiny_runs.said(recipe)


def test_killed_inside_a_save(tmp_path: Path, undisturbed: dict[int, dict[str, float]]) -> None:
    """The half-written checkpoint is ignored, named, and the one before is taken."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    run = tmp_path / "run"
    partial = run / "checkpoints" / "step_00000006.partial"
    kill_after(tiny_runs.launch(recipe, 2), partial.exists, slice(0, 2))
    # A kill may come a moment too late for the machine's speed: then make what it would have left.
    if not partial.exists():
        (run / "checkpoints" / "step_00000006").rename(partial)
        (partial / "manifest.json").unlink()
    tiny_runs.train(recipe, 2)
    assert tiny_runs.losses(run) == undisturbed
    assert "the save did not finish" in tiny_runs.said(recipe)
    assert "resuming at step 3" in tiny_runs.said(recipe)


def test_damaged_checkpoint_falls_back(
    tmp_path: Path, undisturbed: dict[int, dict[str, float]]
) -> None:
    """A flipped byte in the newest checkpoint is found by its checksum."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    run = tmp_path / "run"
    tiny_runs.train(recipe, 2, "train.max_steps=7")
    newest = sorted((run / "checkpoints").iterdir())[-1] / "rank_00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 0xFF
    newest.write_bytes(content)
    tiny_runs.train(recipe, 2)
    assert tiny_runs.losses(run) == undisturbed
    assert "rank_00001.safetensors is damaged" in tiny_runs.said(recipe)
    assert "resuming at step 6" in tiny_runs.said(recipe)


def test_signal_stops_cleanly(tmp_path: Path, undisturbed: dict[int, dict[str, float]]) -> None:
    """SIGUSR1 to one rank: both finish the step, save, and ask to be started again."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    run = tmp_path / "run"
    processes = tiny_runs.launch(recipe, 2)
    deadline = time.monotonic() + 240
    while not reached(run, 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGUSR1)
    assert tiny_runs.finish(processes) == [75, 75], tiny_runs.said(recipe)
    tiny_runs.train(recipe, 2)
    assert tiny_runs.losses(run) == undisturbed


def test_full_disk_while_saving(tmp_path: Path) -> None:
    """A checkpoint that does not fit is said, the earlier ones stay, and the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
        codes = tiny_runs.finish(tiny_runs.launch(recipe, 1, f"output_dir={disk}/run"))
        said = tiny_runs.said(recipe)
        assert codes == [1], said  # the last checkpoint is missing, so it is no success
        assert "was NOT saved" in said
        assert "No space left" in said
        assert "Earlier checkpoints are intact" in said
        kept = sorted((disk / "run" / "checkpoints").iterdir())
        assert [path.name for path in kept][:1] == ["step_00000003"]
        assert all(json.loads((path / "manifest.json").read_text())["files"] for path in kept)
        assert f"step {STEPS}/{STEPS}" in said
    finally:
        subprocess.run(["umount", str(disk)], check=False)
        shutil.rmtree(disk, ignore_errors=True)


def test_other_network_is_refused(tmp_path: Path) -> None:
    """A checkpoint of another network is named, nothing is loaded half."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    tiny_runs.train(recipe, 1, "train.max_steps=3")
    codes = tiny_runs.finish(tiny_runs.launch(recipe, 1, "model.text.mlp_width=128"))
    assert codes == [2]
    assert "it is of another network" in tiny_runs.said(recipe)
