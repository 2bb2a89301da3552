"""train.py whose steps and evaluations take a while without computing: a test can hit each."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.tasks.pretrain import Pretrain

STEP_S, EVALUATION_S = 0.5, 3.0

_inputs, _evaluate = Pretrain.inputs, Pretrain.evaluate


def inputs(self: Pretrain, *arguments: Any) -> tuple[Any, ...]:
    """Inputs of a step, after a pause."""
    time.sleep(STEP_S)
    return _inputs(self, *arguments)


def evaluate(self: Pretrain, *arguments: Any, **named: Any) -> Any:
    """Evaluation of the task, after a pause."""
    time.sleep(EVALUATION_S)
    return _evaluate(self, *arguments, **named)


if __name__ == "__main__":
    Pretrain.inputs = inputs  # type: ignore[method-assign]
    Pretrain.evaluate = evaluate  # type: ignore[method-assign]
    train.command()
