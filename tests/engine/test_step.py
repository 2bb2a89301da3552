"""An optimizer step waits for the device once. A repeat after an overflow gives exact results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import finish, launch, make_recipe, said

pytestmark = pytest.mark.multiprocess


def test_a_repeated_step_leaves_no_trace(tmp_path: Path) -> None:
    """One of two micro-steps overflows on one of two ranks, and is repeated.

    Losses, gradients, queue and weights are bitwise equal to those of a run without overflow.
    """
    runs = {}
    for name, script in (("plain", tiny_runs.TRAIN), ("retried", Path("train_with_retries.py"))):
        folder = tmp_path / name
        folder.mkdir()
        recipe = make_recipe(folder, train={"micro_batch_size": 4, "max_steps": 5})
        script = Path(__file__).parent / script
        assert finish(launch(recipe, 2, script=script)) == [0, 0], said(recipe)
        checkpoint = folder / "run" / "checkpoints" / "step_00000005"
        runs[name] = tiny_runs.losses(folder / "run"), tiny_runs.whole_tensors(checkpoint, "weight")
    assert runs["retried"][0] == runs["plain"][0]
    for name, tensor in runs["plain"][1].items():
        assert tensor.equal(runs["retried"][1][name]), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("negatives", ["local", "global"])
def test_a_step_waits_once(tmp_path: Path, ranks: int, negatives: str) -> None:
    """The loop runs with DeepSpeed's code paths for CUDA, and waits once per step."""
    recipe = make_recipe(
        tmp_path,
        objective={"itm": negatives},
        train={"max_steps": 3, "pad_tokens_to": 16},
        log={"every_steps": 10},
    )
    script = Path(__file__).with_name("train_counting_waits.py")
    assert finish(launch(recipe, ranks, script=script)) == [0] * ranks, said(recipe)
    for rank in range(ranks):
        steps = json.loads((tmp_path / "run" / f"waits_{rank}.json").read_text())
        assert len(steps) == 3
        for waits in steps[1:]:  # the first step also builds cached constants
            assert list(waits) == ["read"], waits
            assert len(waits["read"]) == 1, waits
            assert "transfers.py" in waits["read"][0]
