"""train.py with the backward pass split as for a CUDA graph: compute the gradients, then sum and
reduce them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from torch import Tensor

from blip_scale import train
from blip_scale.engine.zero.engine import ZeroEngine


def backward(self: ZeroEngine, loss: Tensor, is_last: bool) -> None:
    """Run the engine's backward pass in two parts."""
    assert self.capture_obstacle is None
    self.add_gradients(self.compute_gradients(loss), is_last)


if __name__ == "__main__":
    ZeroEngine.backward = backward  # type: ignore[method-assign]
    train.command()
