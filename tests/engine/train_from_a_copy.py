"""train.py that first saves what it has just loaded, as `reloaded` beside the checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.engine import checkpoint, loop

_train = loop._train


def train_after_a_copy(run: loop.Run) -> int:
    """Save, before any step, all that the checkpoint gave."""
    state, shared = run.task.state_dict()
    loaded = checkpoint.RunState(run.step, dict(vars(run.history)), state, shared)
    folder = Path(run.recipe.output_dir) / "reloaded"
    assert checkpoint.save(folder, loaded, run.engine, run.momentum) is not None
    return _train(run)


if __name__ == "__main__":
    loop._train = train_after_a_copy
    train.command()
