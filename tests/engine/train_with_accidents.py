"""train.py in which numbers go wrong at fixed steps: a loss of one rank, then all weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.config.recipe import OptimizerRecipe
from blip_scale.engine import loop
from blip_scale.tasks.pretrain import Pretrain

BAD_LOSS_STEP = 3
"""The loss of rank 1 is once not a number in this step (counted from 1)."""
BURST_STEP = 5
"""The learning rate of this step throws the weights far away: no later loss is finite."""

_spoilt: set[int] = set()
_losses, _learning_rate = Pretrain.losses, loop.learning_rate


def losses(self: Pretrain, network: Any, batch: Any, progress: Any) -> dict[str, Any]:
    """Those of the task, spoilt in one step on rank 1, in the first of its micro-steps."""
    found = _losses(self, network, batch, progress)
    bad = progress.step + 1 == BAD_LOSS_STEP and os.environ["RANK"] == "1"
    if bad and progress.step not in _spoilt:
        _spoilt.add(progress.step)
        found["loss/total"] = found["loss/total"] * float("nan")
    return found


def learning_rate(optimizer: OptimizerRecipe, step: int, *epochs: int) -> float:
    """That of the schedule, but for one step."""
    return 1e37 if step + 1 == BURST_STEP else _learning_rate(optimizer, step, *epochs)


if __name__ == "__main__":
    Pretrain.losses = losses  # type: ignore[method-assign]
    loop.learning_rate = learning_rate
    train.command()
