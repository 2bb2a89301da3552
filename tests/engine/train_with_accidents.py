"""train.py with non-finite values at fixed steps: first the loss of one rank, then all weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import xxhash

from blip_scale import train
from blip_scale.config.recipe import OptimizerRecipe
from blip_scale.engine import loop, step
from blip_scale.engine.run import Run
from blip_scale.storage.checkpoint_format import MOMENTS
from blip_scale.tasks.pretrain import Pretrain, PretrainNetwork

BAD_LOSS_STEP = 3
"""Step (counted from 1) in which one loss of rank 1 is NaN."""
BURST_STEP = 5
"""Step whose huge learning rate makes the weights diverge, so that no later loss is finite."""

_states: dict[int, str] = {}
_optimizer_step = loop.optimizer_step
_spoilt: set[int] = set()
_step = 0
_inputs, _forward, _learning_rate = Pretrain.inputs, PretrainNetwork.forward, step.learning_rate


def inputs(self: Pretrain, batch: Any, progress: Any) -> tuple[Any, ...]:
    """Return the inputs of the task, and record the step."""
    global _step
    _step = progress.step
    return _inputs(self, batch, progress)


def forward(self: PretrainNetwork, *arguments: Any) -> dict[str, Any]:
    """Return the outputs of the network, with a NaN loss in one micro-step of rank 1.

    It is the first micro-step of `BAD_LOSS_STEP`.
    """
    outputs = _forward(self, *arguments)
    bad = _step + 1 == BAD_LOSS_STEP and os.environ["RANK"] == "1"
    if bad and _step not in _spoilt:
        _spoilt.add(_step)
        outputs["loss/total"] = outputs["loss/total"] * float("nan")
    return outputs


def learning_rate(optimizer: OptimizerRecipe, done: int, *epochs: int) -> float:
    """Return the learning rate of the schedule, or a huge one in `BURST_STEP`."""
    return 1e37 if done + 1 == BURST_STEP else _learning_rate(optimizer, done, *epochs)


def noting_step(run: Run, batches: Any) -> bool:
    """Run an optimizer step. Write a hash of all state that it may change to states_RANK.json."""
    stop = _optimizer_step(run, batches)
    state: list[torch.Tensor] = [*run.momentum.averages, *run.task.state_dict()[1].values()]
    for piece in run.engine.slices:
        state.append(piece.weight)
        if run.engine.optimizer.state.get(piece.flat):
            state += [piece.state(run.engine.optimizer, key) for key in MOMENTS]
    digest = xxhash.xxh3_64()
    for tensor in state:
        digest.update(tensor.contiguous().numpy().tobytes())
    _states[run.step] = digest.hexdigest()
    file = Path(run.recipe.output_dir) / f"states_{os.environ['RANK']}.json"
    file.write_text(json.dumps(_states))
    return stop


if __name__ == "__main__":
    loop.optimizer_step = noting_step
    Pretrain.inputs = inputs  # type: ignore[method-assign]
    PretrainNetwork.forward = forward  # type: ignore[method-assign]
    step.learning_rate = learning_rate
    train.command()
