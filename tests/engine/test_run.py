"""Whole runs started as by a user, and their behaviour when something fails."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import socket
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_reference
import pytest
import tiny_runs
import torch
import train_with_a_slow_rank
import train_with_accidents
import yaml
from checkpoint_pieces import newest_whole
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import blip_scale
from blip_scale.config import recipe as recipes
from blip_scale.data.loading.micro_batches import CaptionInput
from blip_scale.data.shards import write_shards
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.engine.watching.loggers.tensorboard import tag
from blip_scale.objectives.feature_queue import FeatureQueue
from blip_scale.tasks import networks

pytestmark = pytest.mark.multiprocess

STEPS, RANKS, BATCH, QUEUE = 6, 2, 16, 40
KINDS = ("weight", "exp_avg", "exp_avg_sq", "momentum")
LOSSES = {"loss/total", "loss/itc", "loss/itm", "loss/lm"}
CURVES = LOSSES | {
    "train/learning_rate", "train/temperature", "train/alpha",
    "gradient_norm/all", "gradient_norm/vision", "gradient_norm/text",
    "itm/accuracy_match", "itm/accuracy_mismatch", "itc/in_batch_i2t", "itc/in_batch_t2i",
    "queue/age_steps", "momentum/gap",
    "speed/samples_per_s", "speed/mfu", "speed/data_wait_share",
    "speed/slowest_rank_ratio",
    "memory/peak_gib", "data/skipped_samples", "data/share_shapes", "data/share_cut_captions",
    "train/skipped_steps",
    "communication/blocked_share", "communication/calls_per_step",
    "communication/gigabytes_per_step", "communication/all_gather_share",
    "communication/reduce_scatter_share", "communication/all_reduce_share",
    "communication/other_share", "alarm/loss_spike", "alarm/loss_spike_ratio",
    "alarm/itm_one_class", "speed/goodput", "speed/wall_start", "speed/wall_evaluation",
    "speed/wall_saving", "speed/wall_repeated", "speed/wall_other", "speed/wall_down",
}  # fmt: skip
SHARES = (
    "speed/goodput",
    "itm/accuracy_match", "itm/accuracy_mismatch", "itc/in_batch_i2t", "itc/in_batch_t2i",
    "train/alpha", "speed/data_wait_share", "communication/blocked_share",
)  # fmt: skip
_DIRECTIONS = ("itc_image_to_text", "itc_text_to_image", "itm_image_to_text", "itm_text_to_image")
RECALLS = {f"heldout/{direction}_r{k}" for direction in _DIRECTIONS for k in (1, 5, 10)}

PAUSES = {"checkpoint/pause_s", "checkpoint/write_s"}


def run_command(recipe: Path, ranks: int | None = None) -> int:
    return tiny_runs.launch_by_command(recipe, ranks).wait(300)


def terminal(recipe: Path) -> str:
    """Return the output of the last command: stdout, then stderr."""
    return (recipe.parent / "stdout").read_text() + (recipe.parent / "stderr").read_text()


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the content and the modification time of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a finished run, started by `deepspeed` on two ranks with ZeRO-3."""
    recipe = tiny_runs.make_recipe(
        tmp_path_factory.mktemp("finished"),
        checkpoint={"every_steps": 3},
        evaluation={"every_steps": 3},
        train={"max_steps": STEPS},
    )
    assert run_command(recipe, RANKS) == 0, terminal(recipe)
    return recipe


def test_the_terminal_shows_our_lines_alone(finished: Path) -> None:
    """Neither rank prints messages of DeepSpeed, torch or transformers to stdout or stderr."""
    assert (finished.parent / "stdout").read_text() == ""
    ours = re.compile(
        r"\d\d:\d\d:\d\d (an epoch|pretrain on 2 rank|weights are |step |saved |done: )"
    )
    first, *lines = (finished.parent / "stderr").read_text().splitlines()
    version = f"blip_scale {blip_scale.__version__}"
    assert first == f"{version}: recipe {finished}, 2 ranks; loading torch and DeepSpeed ..."
    assert [line for line in lines if not ours.match(line)] == []
    assert "shapes 100.0% (64 = 1 x 64)" in lines[0]
    assert (
        "ZeRO-3, fp32, attention by SDPA (FlashAttention runs on CUDA devices, not on cpu)"
        in lines[1]
    )
    steps = [line for line in lines if re.search(r"step \d+/6 ", line)]
    assert len(steps) == STEPS
    assert all(" itc " in line and " lr " in line and " eta " in line for line in steps)
    assert f"tensorboard --logdir {finished.parent / 'run'}" in lines[-1]


def test_the_run_leaves_its_files(finished: Path) -> None:
    run = finished.parent / "run"
    assert recipes.load(str(run / "recipe.yaml")) == recipes.load(str(finished))
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    saved = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step_00000003", "step_00000006"]
    for path in saved:
        assert {file.name for file in path.iterdir()} == {
            "manifest.json", "shared.safetensors",
            "rank_00000.safetensors", "rank_00001.safetensors",
        }  # fmt: skip


def test_the_summary(finished: Path) -> None:
    run = finished.parent / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["ranks"], summary["skipped_samples"]) == (STEPS, RANKS, 0)
    assert (summary["alarms"], summary["skipped_steps"]) == ({}, 0)
    assert summary["seconds"] > 0
    by_step = tiny_runs.losses(run)
    assert list(by_step) == list(range(1, STEPS + 1))
    assert (summary["losses_first"], summary["losses_last"]) == (by_step[1], by_step[STEPS])
    assert set(summary["losses_first"]) == LOSSES
    assert summary["losses_last"]["loss/total"] < summary["losses_first"]["loss/total"]
    assert set(summary["evaluation"]) == RECALLS | {
        "heldout/candidates",
        "heldout/texts",
        "heldout/exact",
    }
    assert summary["evaluation"].pop("heldout/candidates") == 16
    assert summary["evaluation"].pop("heldout/texts") == 16
    assert all(0 <= value <= 1 for value in summary["evaluation"].values())
    keys = {"set", "id", "caption", "truth", "exact", "match"}
    assert [set(entry) for entry in summary["captions"]] == [keys] * 2
    seconds = summary["goodput"]["seconds"]
    assert all(seconds[use] > 0 for use in ("steps", "start", "evaluation", "saving"))
    assert seconds["repeated"] == 0
    share = seconds["steps"] / sum(seconds.values())
    assert summary["goodput"]["share"] == pytest.approx(share, rel=1e-3)  # seconds are rounded
    heartbeat = json.loads((run / "heartbeat.json").read_text())
    assert heartbeat["goodput"]["seconds"]["steps"] == seconds["steps"]


def test_every_curve_is_there(finished: Path) -> None:
    """TensorBoard and metrics.jsonl have all curves, with equal values."""
    run = finished.parent / "run"
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    figures = {f"heldout/{name}" for name in ("candidates", "texts", "exact")}
    assert set(tags["scalars"]) == set(map(tag, CURVES | RECALLS | PAUSES | figures))
    for name in PAUSES:
        assert [point.step for point in events.Scalars(tag(name))] == [3, 6]
        assert all(0 < point.value < 60 for point in events.Scalars(tag(name)))
    by_step = {row["step"]: row for row in rows(run) if "loss/total" in row}
    for name in CURVES:
        points = events.Scalars(tag(name))
        assert [point.step for point in points] == list(range(1, STEPS + 1)), name
        for point in points:
            assert point.value == pytest.approx(by_step[point.step][name], rel=1e-6), name
            assert point.value >= 0, name
    for name in SHARES:
        assert all(point.value <= 1 for point in events.Scalars(tag(name))), name
    for name in ("speed/samples_per_s", "speed/mfu", "memory/peak_gib", "gradient_norm/text"):
        assert all(point.value > 0 for point in events.Scalars(tag(name))), name
    for row in by_step.values():
        parts = row["loss/itc"] + row["loss/itm"] + row["loss/lm"]
        assert row["loss/total"] == pytest.approx(parts, abs=1e-4)
        towers = row["gradient_norm/vision"] ** 2 + row["gradient_norm/text"] ** 2
        assert row["gradient_norm/all"] ** 2 == pytest.approx(towers, rel=1e-5)
        assert row["samples"] == row["step"] * BATCH
    watched = events.Scalars("2_heldout/itc_image_to_text_r1")  # also during training
    assert [point.step for point in watched] == [3, 6]


def test_recipe_and_pictures_are_in_tensorboard(finished: Path) -> None:
    run = finished.parent / "run"
    events = EventAccumulator(str(run / "tensorboard"), {"images": 0, "tensors": 0}).Reload()
    text = events.Tensors("7_recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    shown = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    assert yaml.safe_load(shown) == yaml.safe_load((run / "recipe.yaml").read_text())
    assert [picture.step for picture in events.Images("2_heldout")] == [3, 6]
    panel = Image.open(io.BytesIO(events.Images("2_heldout")[-1].encoded_image_string))
    assert panel.width > 2 * 224 and panel.height > 224  # two images side by side
    table = events.Tensors("2_heldout/text_summary")[-1].tensor_proto.string_val[0].decode()
    for entry in json.loads((run / "summary.json").read_text())["captions"]:
        assert entry["caption"] in table and entry["truth"] in table


def test_the_queue_holds_what_all_ranks_gathered(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file holds the queue of all ranks, in the order of the global batch.

    The ring buffer of 40 entries wraps twice.
    """
    queues: list[FeatureQueue] = []

    class Kept(FeatureQueue):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            queues.append(self)

    monkeypatch.setattr(plain_reference, "FeatureQueue", Kept)
    plain_reference.run(finished, RANKS, STEPS)
    folder = finished.parent / "run" / "checkpoints" / f"step_{STEPS:08d}"
    saved = load_file(folder / "shared.safetensors")
    assert set(saved) == {"queue/image", "queue/text", "queue/entered_at"}
    for key, expected in (
        ("queue/image", queues[0].features.image), ("queue/text", queues[0].features.text),
    ):  # fmt: skip
        assert saved[key].dtype == torch.float32
        torch.testing.assert_close(saved[key], expected, rtol=0, atol=1e-4)
    entered = [-1] * QUEUE
    for number in range(STEPS * BATCH):
        entered[number % QUEUE] = number // BATCH
    assert saved["queue/entered_at"].tolist() == entered
    task = json.loads((folder / "manifest.json").read_text())["task"]
    assert task["queue"] == {"pointer": STEPS * BATCH % QUEUE, "enqueued": STEPS * BATCH}
    assert task["loader"]["samples_seen"] == STEPS * BATCH


def test_a_finished_run_has_nothing_left_to_do(finished: Path) -> None:
    """Starting a finished run again succeeds quickly, and changes nothing."""
    run = finished.parent / "run"
    kept = snapshot(run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    goodput = (run / "goodput.json").read_bytes()
    tiny_runs.train(finished, RANKS)
    output = tiny_runs.said(finished)
    assert "resuming at step 6" in output
    assert "step 6/6" not in output and "evaluated" not in output
    assert snapshot(run / "checkpoints") == kept
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert (run / "goodput.json").read_bytes() == goodput
    assert json.loads((run / "summary.json").read_text()) == summary


def assert_same_checkpoint(written: Path, loaded: Path) -> None:
    """Compare all tensors and all state, regardless of the ranks that wrote them."""
    for kind in KINDS:
        before, after = (tiny_runs.whole_tensors(folder, kind) for folder in (written, loaded))
        assert before.keys() == after.keys() and len(before) > 20
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), f"{kind} {name}"
    before, after = (load_file(folder / "shared.safetensors") for folder in (written, loaded))
    assert before.keys() == after.keys() == {"queue/image", "queue/text", "queue/entered_at"}
    assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = (json.loads((f / "manifest.json").read_text()) for f in (written, loaded))
    for key in ("step", "optimizer_steps", "parameters", "position", "task"):
        assert old[key] == new[key], key


def resume_a_copy(recipe: Path, step: int, ranks: int, stage: int, *arguments: str) -> None:
    """Resume from the checkpoint of `step`, and compare the loaded state with the written one."""
    script = Path(__file__).parent / "train_from_a_copy.py"
    codes = tiny_runs.finish(
        tiny_runs.launch(recipe, ranks, *arguments, stage=stage, script=script)
    )
    assert codes == [0] * ranks, tiny_runs.said(recipe)
    name = f"step_{step:08d}"
    run = recipe.parent / "run"
    assert_same_checkpoint(run / "checkpoints" / name, run / "reloaded" / name)
    assert (
        json.loads((run / "reloaded" / name / "manifest.json").read_text())["world_size"] == ranks
    )


def copy_of_step_3(finished: Path, folder: Path) -> None:
    """Copy the checkpoint of step 3, saved by two ranks of ZeRO-3."""
    written = finished.parent / "run" / "checkpoints" / "step_00000003"
    shutil.copytree(written, folder / "run" / "checkpoints" / written.name)


def test_another_stage_goes_on_with_the_same_losses(tmp_path: Path, finished: Path) -> None:
    recipe = tiny_runs.make_recipe(
        tmp_path, evaluation={"every_steps": 3}, train={"max_steps": STEPS}
    )
    copy_of_step_3(finished, tmp_path)
    resume_a_copy(recipe, 3, RANKS, 2)
    expected, measured = (tiny_runs.losses(path.parent / "run") for path in (finished, recipe))
    for step in range(4, STEPS + 1):
        assert measured[step] == pytest.approx(expected[step], abs=2e-5), step


def test_other_numbers_of_ranks_take_the_same_samples(tmp_path: Path, finished: Path) -> None:
    """A run moves from two ranks to one, to four, then to one under ZeRO-2, and loses nothing.

    The global batch does not change, because the number of micro-steps is adapted.
    """
    recipe = tiny_runs.make_recipe(tmp_path, train={"max_micro_batch_size": 4})
    copy_of_step_3(finished, tmp_path)
    for step, (ranks, stage) in enumerate([(1, 3), (4, 3), (1, 2)], start=3):
        resume_a_copy(recipe, step, ranks, stage, f"train.max_steps={step + 1}")
    lines = (tmp_path / "run" / "ids.jsonl").read_text().splitlines()
    parts = sorted(json.loads(line) for line in lines)
    assert [len(ids) for *_, ids in parts] == [4] * (3 * BATCH // 4)
    taken = [name for *_, ids in parts for name in ids]
    chosen = recipes.load(str(recipe))
    text = CaptionInput(load_tokenizer(chosen.model.text), chosen.model.text.max_tokens)
    loader = networks.train_loader(chosen, text, BATCH)
    order = [name for batch in itertools.islice(iter(loader), STEPS) for name in batch.ids]
    loader.close()
    assert taken == order[3 * BATCH :]


def test_a_slow_rank_and_a_jump_of_the_loss_are_seen(tmp_path: Path) -> None:
    """The slow rank is named, although a step takes the same time on all ranks.

    The jump of the loss is logged with the samples of the step.
    """
    slow = train_with_a_slow_rank
    recipe = tiny_runs.make_recipe(tmp_path, train={"max_steps": slow.SPIKE_STEP + 1})
    script = Path(slow.__file__)
    codes = tiny_runs.finish(tiny_runs.launch(recipe, RANKS, script=script))
    output = tiny_runs.said(recipe)
    assert codes == [0, 0], output
    by_step = {row["step"]: row for row in rows(tmp_path / "run") if "loss/total" in row}
    ratios = [by_step[step]["speed/slowest_rank_ratio"] for step in by_step]
    before, after = ratios[2 : slow.SLOW_FROM_STEP - 1], ratios[slow.SLOW_FROM_STEP :]
    assert 1 <= statistics.median(before) < 1.5 < 1.8 < statistics.median(after)
    named = re.findall(r"step \d+: rank (\d) on (\S+) is slow", output)
    assert ("1", socket.gethostname()) in named
    jumps = [step for step, row in by_step.items() if row["alarm/loss_spike"]]
    assert jumps == [slow.SPIKE_STEP]
    assert by_step[slow.SPIKE_STEP]["alarm/loss_spike_ratio"] > 20
    loss = by_step[slow.SPIKE_STEP]["loss/total"]
    (line,) = re.findall(
        r"step 25: loss/total (\S+), usual is .* worst in step 25 \((.*)\)", output
    )
    assert float(line[0]) == pytest.approx(loss, rel=1e-3)
    assert len(re.findall(r"shapes-\w", line[1])) == 8


def test_plain_python_and_a_corrupt_image(tmp_path: Path) -> None:
    """A rank without a launcher, under ZeRO-2, names and counts a sample that can't be read."""
    spoiled = tiny_runs.records("spoiled")[:BATCH]
    spoiled[5] = replace(spoiled[5], image=b"no image")
    write_shards(tmp_path / "spoiled", spoiled)
    stream = {"name": "spoiled", "local": str(tmp_path / "spoiled")}
    recipe = tiny_runs.make_recipe(
        tmp_path, data={"streams": [stream]}, train={"max_steps": 3}, log={"every_steps": 3}
    )
    assert run_command(recipe) == 0, terminal(recipe)
    run, output = tmp_path / "run", terminal(recipe)
    assert "pretrain on 1 rank(s) of cpu, ZeRO-2" in output
    named = [line for line in output.splitlines() if "could not be read" in line]
    assert len(named) == 1  # although it occurs in each of the three epochs, which have one step
    for line in named:
        assert "WARNING skipped a sample" in line
        assert f"spoiled/shard.00000.mds[5] {spoiled[5].id}: " in line
    assert [row["data/skipped_samples"] for row in rows(run) if "loss/total" in row] == [1, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["ranks"], summary["skipped_samples"]) == (1, 3)
    warned = "WARNING (skipped|optimizer.warmup)"
    ours = re.compile(
        rf"\d\d:\d\d:\d\d (an epoch|pretrain on|weights are|step|saved|done|{warned})"
    )
    assert [line for line in output.splitlines()[1:] if not ours.match(line)] == []


def test_lines_come_by_time_as_well(tmp_path: Path) -> None:
    """Additional lines, logged by time, change neither numbers nor logged points."""
    told = {}
    for name, every_s in (("quiet", None), ("talking", 0.001)):
        recipe = tiny_runs.make_recipe(
            tmp_path / name, train={"max_steps": 4}, log={"every_steps": 1000, "every_s": every_s}
        )
        tiny_runs.train(recipe, RANKS)
        lines = (tmp_path / name / "stderr_0.txt").read_text().splitlines()
        told[name] = [line for line in lines if re.search(r"step \d+/4 ", line)]
    assert [re.search(r"step (\d)/4", line)[1] for line in told["quiet"]] == ["1", "4"]
    assert [re.search(r"step (\d)/4", line)[1] for line in told["talking"]] == ["1", "2", "3", "4"]
    assert " itc " in told["talking"][2] and " samples/s " in told["talking"][2]
    quiet, talking = (tiny_runs.losses(tmp_path / name / "run") for name in told)
    assert quiet == talking and list(quiet) == [1, 4]


def test_a_shard_that_vanishes_stops_the_run(tmp_path: Path) -> None:
    """The message names stream and shard. All ranks end, and the checkpoints are complete."""
    recipe = tiny_runs.make_recipe(
        tmp_path, train={"max_steps": 100_000}, checkpoint={"every_steps": 2, "keep_last": 3}
    )
    processes = tiny_runs.launch(recipe, RANKS)
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 240
    while not (checkpoints / "step_00000004").exists():
        assert processes[0].poll() is None and time.monotonic() < deadline, tiny_runs.said(recipe)
        time.sleep(0.02)
    shard = tmp_path / "shapes" / "shard.00001.mds"
    shard.unlink()
    codes = [process.wait(120) for process in processes]
    output = tiny_runs.said(recipe)
    assert 0 not in codes, output
    assert f"stream 'shapes': shard {shard} is missing" in output
    assert "traceback in" in output
    for path in checkpoints.glob("step_*.partial"):  # left by an interrupted save
        shutil.rmtree(path)
    saved = sorted(checkpoints.iterdir())
    assert len(saved) >= 2
    assert newest_whole(checkpoints) == saved[-1]


@pytest.mark.parametrize(("stage", "micro_batch"), [(3, 8), (2, 4)], ids=["zero3", "zero2-twice"])
def test_numbers_that_go_wrong(tmp_path: Path, stage: int, micro_batch: int) -> None:
    """A step with a non-finite loss or gradient changes nothing on any rank, and is not saved.

    Several such steps in a row end the run.
    """
    recipe = tiny_runs.make_recipe(
        tmp_path,
        train={"max_steps": 100, "max_nonfinite_steps": 3, "micro_batch_size": micro_batch},
        checkpoint={"every_steps": 1},
    )
    script = Path(train_with_accidents.__file__)
    processes = tiny_runs.launch(recipe, RANKS, stage=stage, script=script)
    codes = [process.wait(300) for process in processes]
    output = tiny_runs.said(recipe)
    assert codes == [1, 1], output
    burst, bad = train_with_accidents.BURST_STEP, train_with_accidents.BAD_LOSS_STEP
    assert f"giving up at step {burst + 3}: loss or gradient was not finite in 3 steps" in output
    skipped = r"step (\d+): loss or gradient not finite, update skipped \((shapes-.*), \.\.\.\)"
    expected = [bad, burst + 1, burst + 2, burst + 3]
    for rank in range(RANKS):  # both ranks skip the same steps, and name the samples of both
        log = (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text()
        matches = re.findall(skipped, log)
        assert [int(step) for step, _ in matches] == expected
        assert all(len(ids.split(", ")) == 8 for _, ids in matches)
    assert output.count("update skipped") == len(expected)  # once on the terminal

    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    skipped_steps = {bad, burst + 1, burst + 2, burst + 3}
    taken = [step for step in range(1, burst + 4) if step not in skipped_steps]
    assert [int(path.name[5:]) for path in saved] == taken
    for kind in KINDS:
        tensors = tiny_runs.whole_tensors(saved[-1], kind).values()
        assert all(tensor.isfinite().all() for tensor in tensors)
    for rank in range(RANKS):  # weights, moments, averages and queue do not change
        states = json.loads((tmp_path / "run" / f"states_{rank}.json").read_text())
        for step in range(2, burst + 4):
            stood_still = states[str(step)] == states[str(step - 1)]
            assert stood_still == (step in skipped_steps), (rank, step)
    by_step = {row["step"]: row for row in rows(tmp_path / "run") if "loss/total" in row}
    skips = {step: row["train/skipped_steps"] for step, row in by_step.items()}
    assert skips == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 3}
    assert by_step[bad]["loss/total"] is None
    assert by_step[bad + 1]["loss/total"] > 0
