"""train.py in which rank 1 becomes slow, and the loss jumps once."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.tasks.pretrain import Pretrain, PretrainNetwork

SLOW_FROM_STEP = 13
"""First step (counted from 1) in which rank 1 sleeps in every forward pass."""
SLEEP_S = 0.8
SPIKE_STEP = 25
"""Step whose loss is multiplied by 100 on all ranks."""

_step = 0
_inputs, _forward = Pretrain.inputs, PretrainNetwork.forward


def inputs(self: Pretrain, batch: Any, progress: Any) -> tuple[Any, ...]:
    """Return the inputs of the task, with a delay on one rank, and record the step."""
    global _step
    _step = progress.step
    if _step + 1 >= SLOW_FROM_STEP and os.environ["RANK"] == "1":
        time.sleep(SLEEP_S)
    return _inputs(self, batch, progress)


def forward(self: PretrainNetwork, *arguments: Any) -> dict[str, Any]:
    """Return the outputs of the network, with a large loss in one step."""
    outputs = _forward(self, *arguments)
    if _step + 1 == SPIKE_STEP:
        outputs["loss/total"] = outputs["loss/total"] * 100
    return outputs


if __name__ == "__main__":
    Pretrain.inputs = inputs  # type: ignore[method-assign]
    PretrainNetwork.forward = forward  # type: ignore[method-assign]
    train.command()
