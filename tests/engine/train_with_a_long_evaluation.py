"""train.py whose evaluations take a minute while a file beside the output folder says so."""

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
    """Evaluation of the task, after a minute."""
    if (Path(self.recipe.output_dir).parent / SLOW).exists():
        time.sleep(SECONDS)
    return _evaluate(self, *arguments, **named)


if __name__ == "__main__":
    Pretrain.evaluate = evaluate  # type: ignore[method-assign]
    train.command()
