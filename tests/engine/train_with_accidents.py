"""train.py with NaN at fixed steps: first in the loss of one rank, then in all weights."""

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
"""The loss of rank 1 is once not a number in this step (counted from 1)."""
BURST_STEP = 5
"""The learning rate of this step throws the weights far away: no later loss is finite."""

_states: dict[int, str] = {}
_optimizer_step = loop.optimizer_step
_spoilt: set[int] = set()
_step = 0
_inputs, _forward, _learning_rate = Pretrain.inputs, PretrainNetwork.forward, step.learning_rate


def inputs(self: Pretrain, batch: Any, progress: Any) -> tuple[Any, ...]:
    """Inputs of the task. The step is recorded."""
    global _step
    _step = progress.step
    return _inputs(self, batch, progress)


def forward(self: PretrainNetwork, *arguments: Any) -> dict[str, Any]:
    """Outputs of the network. In one step the loss is NaN on rank 1, in the first micro-step."""
    outputs = _forward(self, *arguments)
    bad = _step + 1 == BAD_LOSS_STEP and os.environ["RANK"] == "1"
    if bad and _step not in _spoilt:
        _spoilt.add(_step)
        outputs["loss/total"] = outputs["loss/total"] * float("nan")
    return outputs


def learning_rate(optimizer: OptimizerRecipe, done: int, *epochs: int) -> float:
    """Rate of the schedule, except for one step."""
    return 1e37 if done + 1 == BURST_STEP else _learning_rate(optimizer, done, *epochs)


def noting_step(run: Run, batches: Any) -> bool:
    """Run the loop's step. A hash of all that a step may change goes to states_RANK.json."""
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
