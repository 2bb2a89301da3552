"""A run that is killed at any moment resumes with bitwise equal losses.

A full or damaged disk does not lose saved checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import tiny_runs
import torch
import train_killed_in_a_save
import train_with_a_long_evaluation

from blip_scale.config import recipe as recipes
from blip_scale.data.loading.loader import TrainLoader
from blip_scale.data.loading.micro_batches import CaptionInput, LoaderPosition
from blip_scale.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.multiprocess

STEPS = 30  # enough, so that every kill comes before the end
OFTEN = {"checkpoint": {"every_steps": 3}, "train": {"max_steps": STEPS}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Return the losses of a run on two ranks that was not killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny_runs.train(tiny_runs.make_recipe(folder, **OFTEN), 2)
    return tiny_runs.losses(folder / "run")


def wait_for(moment: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until `moment()` is true. Fail if the process ends first."""
    deadline = time.monotonic() + 240
    while not moment():
        assert time.monotonic() < deadline, "the moment never came"
        assert process.poll() is None, "the run ended before the moment came"
        time.sleep(0.002)


def ranks_below(launcher: subprocess.Popen) -> list[psutil.Process]:
    """Return the processes of the ranks started by the `deepspeed` command, rank 0 first."""
    processes = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        rank = [part for part in process.cmdline() if part.startswith("--local_rank=")]
        if rank:
            processes[rank[0]] = process
    return [processes[rank] for rank in sorted(processes)]


def phase(run: Path) -> str:
    """Return the phase of the run, from its heartbeat."""
    file = run / "heartbeat.json"
    return str(json.loads(file.read_text())["phase"]) if file.exists() else ""


def reached(run: Path, step: int) -> bool:
    """Return True if metrics.jsonl has a line for `step`."""
    file = run / "metrics.jsonl"
    return file.exists() and f'"step": {step},' in file.read_text()


def test_killed_at_random_moments(tmp_path: Path, undisturbed: dict[int, dict[str, float]]) -> None:
    """First, one rank is killed, and the launcher ends the other. Then all are killed at once."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    run = tmp_path / "run"
    dice = random.Random(time.time_ns())
    began = time.time()
    launcher = tiny_runs.launch_by_command(recipe, 2)
    step = dice.randint(4, 6)
    wait_for(lambda: reached(run, step), launcher)
    ranks = ranks_below(launcher)
    time.sleep(dice.random() * 0.3)
    ranks[dice.randint(0, 1)].kill()
    assert launcher.wait(120) != 0
    assert not psutil.wait_procs(ranks, timeout=60)[1], "a rank outlived the launcher"

    processes = tiny_runs.launch(recipe, 2)
    step = dice.randint(7, 10)
    wait_for(lambda: reached(run, step), processes[0])
    time.sleep(dice.random() * 0.3)
    for process in processes:
        process.kill()
    assert tiny_runs.finish(processes) == [-signal.SIGKILL] * 2
    tiny_runs.train(recipe, 2)
    assert tiny_runs.losses(run) == undisturbed
    assert "resuming at step" in tiny_runs.said(recipe)
    assert_wall_time_is_accounted_for(run, began)


def assert_wall_time_is_accounted_for(run: Path, began: float) -> None:
    """Check the record of a killed run: the uses of time add up, and each step counts once."""
    record = json.loads((run / "goodput.json").read_text())
    seconds = record["seconds"]
    assert began < record["first_start"] < began + 60
    wall_s = time.time() - record["first_start"]
    assert wall_s - 20 < sum(seconds.values()) <= wall_s  # the last process has ended since
    assert all(seconds[use] > 0 for use in ("steps", "start", "saving", "down"))
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps_s = sum(16 / point["speed/samples_per_s"] for point in points if "loss/total" in point)
    # Goodput also counts the time between the steps, which the metrics do not measure.
    assert 0.9 * steps_s < seconds["steps"] <= 1.2 * steps_s


def test_a_rank_that_stalls_or_dies_ends_the_others(
    tmp_path: Path, undisturbed: dict[int, dict[str, float]]
) -> None:
    """Without a launcher, ranks end within the recipe's time limit, and log their stacks.

    They name the rank for which they wait. The run then resumes, and its record shows that every
    sample was used exactly once.
    """
    limit_s = 8
    recipe = tiny_runs.make_recipe(
        tmp_path,
        checkpoint={"every_steps": 3},
        train={"max_steps": STEPS},
        hang_limits={"step_s": limit_s},
        log={"sample_ids": True},
    )
    run = tmp_path / "run"
    processes = tiny_runs.launch(recipe, 2)
    wait_for(lambda: reached(run, 4), processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert processes[0].wait(60) == 1
    assert time.monotonic() - stopped < limit_s + 20
    log = (run / "logs" / "rank_0.log").read_text()
    assert f"Timeout (0:00:{limit_s + 2}" in log and "in _train" in log
    assert f"stalled: no progress for {limit_s} s while training" in log
    assert re.search(r"it waits for rank 1 on \S+, which gives no sign of life", log)
    processes[1].send_signal(signal.SIGCONT)
    assert processes[1].wait(60) != 0

    processes = tiny_runs.launch(recipe, 2)
    wait_for(lambda: reached(run, 7), processes[0])
    processes[1].kill()
    assert processes[0].wait(60) == 1
    tiny_runs.train(recipe, 2)
    assert tiny_runs.losses(run) == undisturbed
    _assert_every_sample_once(recipe)

    heartbeat = json.loads((run / "heartbeat.json").read_text())
    assert (heartbeat["phase"], heartbeat["restarts"]) == ("done", 2)
    assert (heartbeat["step"], heartbeat["checkpoint_step"]) == (STEPS, STEPS)
    attempts = json.loads((run / "manifest.json").read_text())["attempts"]
    assert [attempt["ended"]["why"][:9] for attempt in attempts] == [
        "not known", "RuntimeEr", "done",
    ]  # fmt: skip
    assert attempts[0]["from"] is None
    for attempt in attempts[1:]:
        assert re.search(r"step_0000000[369]$", attempt["from"]["checkpoint"])


def _assert_every_sample_once(recipe: Path) -> None:
    """Compare the record of each rank with the samples of an undisturbed loader."""
    chosen = recipes.load(str(recipe))
    text = CaptionInput(load_tokenizer(chosen.model.text), chosen.model.text.max_tokens)
    for rank in range(2):
        position = LoaderPosition(rank, 2, 8, chosen.train.global_batch_size)
        loader = TrainLoader(
            chosen.data, chosen.model.vision.image_size, text, chosen.seed, position
        )
        expected = [
            {"step": step, "ids": batch.ids}
            for step, batch in zip(range(1, STEPS + 1), loader, strict=False)
        ]
        file = recipe.parent / "run" / "samples" / f"rank_{rank}.jsonl"
        assert [json.loads(line) for line in file.read_text().splitlines()] == expected


@pytest.mark.parametrize("moment", list(train_killed_in_a_save.MOMENTS))
def test_killed_inside_a_save(
    tmp_path: Path, undisturbed: dict[int, dict[str, float]], moment: str
) -> None:
    """The incomplete checkpoint is reported and ignored, and the previous one is loaded."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    run = tmp_path / "run"
    script = Path(train_killed_in_a_save.__file__)
    processes = tiny_runs.launch(recipe, 2, f"--moment={moment}", script=script)
    killed, other = processes
    assert killed.wait(240) == -signal.SIGKILL
    other.kill()
    other.wait()
    assert (run / "checkpoints" / "step_00000006.partial").exists()
    tiny_runs.train(recipe, 2)
    assert tiny_runs.losses(run) == undisturbed
    assert "the save did not finish" in tiny_runs.said(recipe)
    assert "resuming at step 3" in tiny_runs.said(recipe)


def test_damaged_checkpoint_falls_back(
    tmp_path: Path, undisturbed: dict[int, dict[str, float]]
) -> None:
    """The checksum detects a flipped byte in the newest checkpoint."""
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
    """After SIGUSR1 to one rank, both ranks finish the step, save, and exit with code 75."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    run = tmp_path / "run"
    processes = tiny_runs.launch(recipe, 2)
    wait_for(lambda: reached(run, 4), processes[0])
    processes[1].send_signal(signal.SIGUSR1)
    assert tiny_runs.finish(processes) == [75, 75], tiny_runs.said(recipe)
    tiny_runs.train(recipe, 2)
    assert tiny_runs.losses(run) == undisturbed


def test_a_signal_in_an_evaluation_stops_at_once_with_everything_saved(
    tmp_path: Path, undisturbed: dict[int, dict[str, float]]
) -> None:
    """The checkpoint is saved before the evaluation. The next start does the evaluation."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN, evaluation={"every_steps": 16})
    run, script = tmp_path / "run", Path(train_with_a_long_evaluation.__file__)
    slow = tmp_path / train_with_a_long_evaluation.SLOW
    slow.touch()
    processes = tiny_runs.launch(recipe, 2, script=script)
    wait_for(lambda: phase(run) == "evaluating", processes[0])
    assert (run / "checkpoints" / "step_00000016").is_dir()
    began = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert tiny_runs.finish(processes) == [75, 75], tiny_runs.said(recipe)
    assert time.monotonic() - began < train_with_a_long_evaluation.SECONDS / 2
    assert "SIGTERM: stopping; the evaluation of step 16 comes next" in tiny_runs.said(recipe)
    slow.unlink()
    assert tiny_runs.finish(tiny_runs.launch(recipe, 2, script=script)) == [0, 0]
    assert "resuming at step 16" in tiny_runs.said(recipe)
    assert tiny_runs.losses(run) == undisturbed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "heldout/itc_image_to_text_r1" in line]
    assert evaluated == [16, STEPS]
    metrics = (run / "metrics.jsonl").read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()  # as if the run was killed between the evaluation and the end
    tiny_runs.train(recipe, 2)
    assert f"step {STEPS} was evaluated before" in tiny_runs.said(recipe)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    again = json.loads((run / "summary.json").read_text())
    assert {**again, "goodput": summary["goodput"]} == summary


def test_resume_with_everything_on(tmp_path: Path) -> None:
    """A resumed run writes the same last line and a bitwise equal last checkpoint.

    The run uses bf16, accumulation, gradient checkpointing and a loader process. It resumes at a
    step that is not logged.
    """
    recipe = tiny_runs.make_recipe(
        tmp_path,
        train={"max_steps": 8, "precision": "bf16", "micro_batch_size": 4},
        log={"every_steps": 4},
        checkpoint={"every_steps": 3},
        data={"workers": 1},
    )
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000008"
    ends = []
    for _ in range(2):  # the second run resumes from step 6
        shutil.rmtree(last, ignore_errors=True)
        tiny_runs.train(recipe, 2, "model.gradient_checkpointing=true")
        kinds = ("weight", "exp_avg", "exp_avg_sq", "momentum")
        tensors = {kind: tiny_runs.whole_tensors(last, kind) for kind in kinds}
        ends.append((tiny_runs.losses(run), tensors))
    assert "resuming at step 6" in tiny_runs.said(recipe)
    (losses, tensors), (losses_again, tensors_again) = ends
    assert losses == losses_again and 8 in losses
    for kind, named in tensors.items():
        assert named and named.keys() == tensors_again[kind].keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, tensors_again[kind][name]), f"{kind} {name}"


def test_full_disk_while_saving(tmp_path: Path, undisturbed: dict[int, dict[str, float]]) -> None:
    """If a checkpoint does not fit, this is logged, and the run continues.

    The previous checkpoint stays intact.
    """
    with small_disk(tmp_path, "size=64m") as disk:
        recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
        folder = f"checkpoint.folder={disk}/checkpoints"
        tiny_runs.train(recipe, 2, folder, "train.max_steps=3")
        (earlier,) = (disk / "checkpoints").iterdir()
        before = {path.name: path.read_bytes() for path in earlier.iterdir()}
        room = sum(map(len, before.values())) // 2  # not enough for another checkpoint
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - room))
        codes = tiny_runs.finish(tiny_runs.launch(recipe, 2, folder))
        output = tiny_runs.said(recipe)
        assert set(codes) == {1}, output  # a failure, because the last checkpoint is missing
        assert "resuming at step 3" in output
        assert output.count("was NOT saved") == (STEPS - 3) // 3
        assert "No space left" in output
        assert "Earlier checkpoints are intact" in output
        assert tiny_runs.losses(tmp_path / "run") == undisturbed
        assert [path.name for path in (disk / "checkpoints").iterdir()] == [earlier.name]
        assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount an in-memory file system with the given options of mount."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        assert not os.environ.get("CI"), "CI must be able to mount a small disk"
        pytest.skip("mounting a small disk needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=False)
        shutil.rmtree(disk, ignore_errors=True)


@pytest.mark.parametrize("inodes", [1, 2])
def test_a_disk_without_inodes_is_a_failure_in_one_line(tmp_path: Path, inodes: int) -> None:
    """The cause is the machine, not the input, so the exit code is 1 and a job is requeued."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    with small_disk(tmp_path, f"nr_inodes={inodes}") as disk:
        folder = f"checkpoint.folder={disk}/checkpoints"
        codes = tiny_runs.finish(tiny_runs.launch(recipe, 1, folder))
    lines = [line for line in tiny_runs.said(recipe).splitlines() if "No space left" in line]
    assert codes == [1] and len(lines) == 1, tiny_runs.said(recipe)
    assert f"no checkpoint can be written to {disk}/checkpoints; free some space there" in lines[0]


def test_other_network_is_refused(tmp_path: Path) -> None:
    """A checkpoint of a different network is named in the error, and nothing of it is loaded."""
    recipe = tiny_runs.make_recipe(tmp_path, **OFTEN)
    tiny_runs.train(recipe, 1, "train.max_steps=3")
    codes = tiny_runs.finish(tiny_runs.launch(recipe, 1, "model.text.mlp_width=128"))
    assert codes == [2]
    assert "it is of another network" in tiny_runs.said(recipe)
