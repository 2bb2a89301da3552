"""train.py in which the draws of rank 1 exceed their capacity in some steps."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.tasks.pretrain import Pretrain, PretrainNetwork

RETRIED_STEPS = (1, 4)
"""Optimizer steps (counted from 1) in whose second micro-step the draws overflow."""

_overflows = False
_inputs, _forward = Pretrain.inputs, PretrainNetwork.forward


def inputs(self: Pretrain, batch: Any, progress: Any) -> tuple[Any, ...]:
    """Return the inputs of the task, and decide if this micro-step overflows."""
    global _overflows
    is_second = progress.micro_step % self.accumulation == 1
    due = progress.step + 1 in RETRIED_STEPS and is_second and os.environ["RANK"] == "1"
    _overflows = due and not progress.full_capacity
    return _inputs(self, batch, progress)


def forward(self: PretrainNetwork, *arguments: Any) -> dict[str, Any]:
    """Return the outputs of the network. If the draws overflow, they are wrong."""
    outputs = _forward(self, *arguments)
    if _overflows:
        outputs["loss/total"] = outputs["loss/total"] * 3
    outputs["retry"] = torch.tensor(float(_overflows))
    return outputs


if __name__ == "__main__":
    Pretrain.inputs = inputs  # type: ignore[method-assign]
    PretrainNetwork.forward = forward  # type: ignore[method-assign]
    train.command()
