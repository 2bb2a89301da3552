"""`train.py --dry-run` reports all problems of a set-up at once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import finish, launch, make_recipe, run_forked, said

Command = Callable[..., subprocess.CompletedProcess[str]]


def lines(output: str) -> dict[str, tuple[str, str]]:
    """Name of a check -> level and message, parsed from lines `time LEVEL NAME: MESSAGE`."""
    checks = {}
    for line in output.splitlines():
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[1] in ("ok", "warning", "FAILED"):
            name, _, message = words[2].partition(": ")
            checks[name] = (words[1], message)
    return checks


def dry_run(
    train: Command, recipe: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return train("--recipe", str(recipe), "--dry-run", *arguments, timeout_s=300, **environment)


def dry_run_forked(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked(recipe.parent, "--recipe", str(recipe), "--dry-run", *arguments)


@pytest.mark.multiprocess
def test_a_sound_set_up_is_ready(tmp_path: Path, train: Command) -> None:
    done = dry_run(train, make_recipe(tmp_path), "--ranks", "2", "--gpu", "h100")
    checks = lines(done.stderr)
    assert done.returncode == 0, done.stderr
    assert {level for level, _ in checks.values()} <= {"ok", "warning"}
    assert checks["batch"] == ("ok", "16 = 2 ranks x 8 x 1 micro-steps")
    assert "64 samples" in checks["stream shapes"][1]
    assert checks["GPU memory"][1].startswith("fits")
    assert "not measured" in checks["interconnect"][1]
    assert checks["attention"] == ("ok", "SDPA (FlashAttention runs on CUDA devices, not on cpu)")
    assert not (tmp_path / "run").exists()  # a dry run leaves no files


@pytest.mark.multiprocess
@pytest.mark.parametrize(("more", "level"), [([], "FAILED"), (["--gpu", "H100"], "warning")])
def test_attention_that_a_run_refuses_is_not_passed(
    more: list[str], level: str, tmp_path: Path
) -> None:
    file = make_recipe(tmp_path)
    done = dry_run_forked(file, "model.attention=flash", *more)
    assert lines(done.stderr)["attention"][0] == level
    assert "model.attention: flash cannot run" in lines(done.stderr)["attention"][1]
    assert done.returncode == (2 if level == "FAILED" else 0), done.stderr
    if not more:
        done = run_forked(tmp_path, "--recipe", str(file), "model.attention=flash")
        assert done.returncode == 2 and "flash cannot run" in done.stderr, "as the run says"


def test_a_gpu_of_no_clear_name_is_refused_at_once(tmp_path: Path, train: Command) -> None:
    done = dry_run(train, make_recipe(tmp_path), "--gpu", "a100")
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: --gpu a100: which one, a100-40 or a100-80? ")
    assert done.stderr.count("\n") == 1


@pytest.mark.multiprocess
def test_all_problems_are_seen_at_once(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"streams": [{"name": "lost", "local": str(tmp_path / "nowhere")}]},
        "model": {"text": {"tokenizer": str(tmp_path / "no" / "such" / "tokenizer")}},
        "output_dir": str(tmp_path / "recipe.yaml" / "run"),  # a path below a file
    }
    file = make_recipe(tmp_path, **changes)
    done = dry_run_forked(file, "--ranks", "3")
    checks = lines(done.stderr)
    assert done.returncode == 2
    broken = {name for name, (level, _) in checks.items() if level == "FAILED"}
    assert {"settings", "batch", "initial weights", "stream lost", "output"} <= broken
    assert "possible: train.global_batch_size=15 or 18" in checks["batch"][1]
    assert "no index.json" in checks["stream lost"][1]
    assert "is not writable" in checks["output"][1]
    assert checks["stream heldout"][0] == "ok"
    assert "host memory" not in broken
    assert "checks failed" in done.stderr


@pytest.mark.multiprocess
def test_too_little_memory_is_named_with_its_mend(tmp_path: Path) -> None:
    wide = {"vision": {"overrides": {"patch_size": 8, "embed_dim": 768, "depth": 24}}}
    train_section = {"global_batch_size": 4096}
    objective = {"queue_size": 4096}
    file = make_recipe(tmp_path, model=wide, train=train_section, objective=objective)
    done = dry_run_forked(file, "--gpu", "rtx4090")
    level, message = lines(done.stderr)["GPU memory"]
    assert done.returncode == 2 and level == "FAILED"
    assert "does not fit" in message and "train.micro_batch_size=" in message


@pytest.mark.multiprocess
def test_two_ranks_measure_what_lies_between_them(tmp_path: Path) -> None:
    file = make_recipe(tmp_path)
    codes = finish(launch(file, 2, "--dry-run"))
    assert codes == [0, 0], said(file)
    level, message = lines(said(file))["interconnect"]
    assert level == "ok" and "2 ranks sum 64 MiB" in message and "GB/s" in message
