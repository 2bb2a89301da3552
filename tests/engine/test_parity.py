"""Compare ZeRO with one plain PyTorch process on the same global batch.

Losses, weights and momentum copies must be equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_reference
import pytest
import tiny_runs
import torch

pytestmark = pytest.mark.multiprocess

STEPS = 5
COMPILED: dict[str, Any] = {
    "compile": True,
    "vision": {"overrides": {"depth": 1}},
    "text": {"layers": 1, "dropout": 0.0},
}
"""Compiled network with few graphs, because each graph takes seconds to compile. Other kinds of
layers are tested in tests/model/test_compiling.py. Dropout is off, because compiled dropout draws
different numbers."""
PADDED = {"pad_tokens_to": 64}
"""Setting that gives all batches the same size, as on a GPU. All ranks and steps of these cases
then share their graphs."""
PARTITIONED_AND_MORE: dict[str, Any] = {
    "train": {"whole_weights": False, "micro_batch_size": 4},
    "optimizer": {"gradient_clip": 5.0},
    "model": {"vision": {"frozen_layers": 1}, "gradient_checkpointing": True},
}


@pytest.mark.parametrize(
    ("stage", "ranks", "settings"),
    [
        (3, 2, {}),
        (3, 2, {"optimizer": {"gradient_clip": 5.0}, "train": {"micro_batch_size": 4}}),
        (2, 2, {}),
        (3, 1, {}),
        (3, 2, {"model": {"gradient_checkpointing": True}}),
        (3, 2, {"objective": {"itm": "global"}, "model": {"text": {"dropout": 0.0}}}),
        (3, 2, {"model": {"vision": {"patch_dropout": 0.5}, "gradient_checkpointing": True}}),
        (3, 2, {"model": {"vision": {"frozen_layers": 1}, "gradient_checkpointing": True}}),
        (2, 2, {"model": {"vision": {"frozen_layers": 1, "patch_dropout": 0.25}}}),
        (3, 4, {}),
        (3, 1, {"train": {"whole_weights": False}}),
        (3, 2, PARTITIONED_AND_MORE),
        (3, 4, {"train": {"whole_weights": False}}),
        (3, 1, {"model": COMPILED, "train": {**PADDED, "micro_batch_size": 8}}),
        (3, 2, {"model": COMPILED, "train": PADDED}),
        (2, 2, {"model": {**COMPILED, "gradient_checkpointing": True}, "train": PADDED}),
    ],
    ids=[
        "zero3",
        "zero3-accumulation-clipping",
        "zero2",
        "zero3-one-rank",
        "zero3-checkpointed-blocks",
        "zero3-negatives-of-all-ranks",
        "zero3-patch-dropout",
        "zero3-frozen-layers",
        "zero2-both",
        "zero3-four-ranks",
        "zero3-partitioned-one-rank",
        "zero3-partitioned-checkpointed-frozen-accumulation-clipping",
        "zero3-partitioned-four-ranks",
        "zero3-one-rank-compiled-accumulation",
        "zero3-compiled",
        "zero2-compiled-checkpointed-blocks",
    ],
)
def test_equals_a_plain_process(
    tmp_path: Path, stage: int, ranks: int, settings: dict[str, Any]
) -> None:
    """Runs are in fp32 with dropout. The queue of 40 wraps within a batch of 16.

    Under ZeRO-3, weights are whole unless a case sets it otherwise.
    """
    recipe = tiny_runs.make_recipe(tmp_path, **settings)
    tiny_runs.train(recipe, ranks, f"train.max_steps={STEPS}", stage=stage)
    expected = plain_reference.run(recipe, ranks, STEPS)
    losses = tiny_runs.losses(tmp_path / "run")
    for step in range(1, STEPS + 1):
        assert losses[step] == pytest.approx(expected.losses[step], abs=2e-5), step
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}"
    for kind, wanted in (("weight", expected.weights), ("momentum", expected.momentum)):
        measured = tiny_runs.whole_tensors(checkpoint, kind)
        assert measured.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(measured[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("stage", [2, 3])
def test_momentum_in_bf16_keeps_fp32_averages(tmp_path: Path, stage: int) -> None:
    """A bf16 run computes its momentum averages in fp32. In bf16, most would not change."""
    recipe = tiny_runs.make_recipe(
        tmp_path,
        train={"precision": "bf16"},
        objective={"momentum": 0.995},
        checkpoint={"every_steps": 1},
    )
    tiny_runs.train(recipe, 2, f"train.max_steps={STEPS}", stage=stage)
    folder = tmp_path / "run" / "checkpoints"
    weights = [
        tiny_runs.whole_tensors(folder / f"step_{step:08d}", "weight")
        for step in range(1, STEPS + 1)
    ]
    averages = [
        tiny_runs.whole_tensors(folder / f"step_{step:08d}", "momentum")
        for step in range(1, STEPS + 1)
    ]
    moved_in_bf16 = changed = elements = 0
    for name in averages[0]:
        average = averages[0][name]
        naive = average.bfloat16()
        for step in range(1, STEPS):
            average = average + 0.005 * (weights[step][name] - average)
            naive = naive + 0.005 * (weights[step][name].bfloat16() - naive)
            torch.testing.assert_close(
                averages[step][name], average, rtol=1e-6, atol=1e-8, msg=name
            )
        changed += int((average != averages[0][name]).sum())
        moved_in_bf16 += int((naive != averages[0][name].bfloat16()).sum())
        elements += average.numel()
    assert changed > 0.9 * elements  # in fp32, nearly every element changes
    assert moved_in_bf16 < 0.2 * elements  # in bf16, most elements do not change
