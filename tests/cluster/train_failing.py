"""train.py with one rank that fails in the same step at every start.

A broken shard of weights, or a kernel that cannot handle one batch, would act like this.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.tasks.pretrain import Pretrain

FAILING_STEP = 6
MESSAGE = "this batch cannot be computed"

_inputs = Pretrain.inputs


def inputs(self: Pretrain, batch: Any, progress: Any) -> tuple[Any, ...]:
    """Inputs of the task until rank 1 reaches the failing step."""
    if progress.step + 1 == FAILING_STEP and os.environ["RANK"] == "1":
        raise RuntimeError(MESSAGE)
    return _inputs(self, batch, progress)


if __name__ == "__main__":
    Pretrain.inputs = inputs  # type: ignore[method-assign]
    train.command()
