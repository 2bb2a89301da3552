"""train.py whose evaluations take a minute longer if a marker file is beside the output folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.tasks.pretrain import Pretrain

SLOW = "evaluations_are_slow"
SECONDS = 60.0

_evaluate = Pretrain.evaluate


def evaluate(self: Pretrain, *arguments: Any, **named: Any) -> Any:
    """Run the task's evaluation, after a minute if the marker file exists."""
    if (Path(self.recipe.output_dir).parent / SLOW).exists():
        time.sleep(SECONDS)
    return _evaluate(self, *arguments, **named)


if __name__ == "__main__":
    Pretrain.evaluate = evaluate  # type: ignore[method-assign]
    train.command()
