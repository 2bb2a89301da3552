"""train.py in which rank 1 becomes slow, and a loss jumps once."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.tasks.pretrain import Pretrain

SLOW_FROM_STEP = 13
"""Rank 1 sleeps in every forward from this step on (counted from 1)."""
SLEEP_S = 0.4
SPIKE_STEP = 25
"""The loss of this step is a hundred times as large, on all ranks."""

_losses = Pretrain.losses


def losses(self: Pretrain, network: Any, batch: Any, progress: Any) -> dict[str, Any]:
    """Those of the task."""
    if progress.step + 1 >= SLOW_FROM_STEP and os.environ["RANK"] == "1":
        time.sleep(SLEEP_S)
    found = _losses(self, network, batch, progress)
    if progress.step + 1 == SPIKE_STEP:
        found["loss/total"] = found["loss/total"] * 100
    return found


if __name__ == "__main__":
    Pretrain.losses = losses  # type: ignore[method-assign]
    train.command()
