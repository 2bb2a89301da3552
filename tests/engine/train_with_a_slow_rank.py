"""train.py in which rank 1 becomes slow, and a loss jumps once."""

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
"""Rank 1 sleeps in every forward from this step on (counted from 1)."""
SLEEP_S = 0.8
SPIKE_STEP = 25
"""The loss of this step is a hundred times as large, on all ranks."""

_step = 0
_inputs, _forward = Pretrain.inputs, PretrainNetwork.forward


def inputs(self: Pretrain, batch: Any, progress: Any) -> tuple[Any, ...]:
    """Inputs of the task, late on one rank. The step is recorded."""
    global _step
    _step = progress.step
    if _step + 1 >= SLOW_FROM_STEP and os.environ["RANK"] == "1":
        time.sleep(SLEEP_S)
    return _inputs(self, batch, progress)


def forward(self: PretrainNetwork, *arguments: Any) -> dict[str, Any]:
    """Outputs of the network, with a large loss in one step."""
    outputs = _forward(self, *arguments)
    if _step + 1 == SPIKE_STEP:
        outputs["loss/total"] = outputs["loss/total"] * 100
    return outputs


if __name__ == "__main__":
    Pretrain.inputs = inputs  # type: ignore[method-assign]
    PretrainNetwork.forward = forward  # type: ignore[method-assign]
    train.command()
