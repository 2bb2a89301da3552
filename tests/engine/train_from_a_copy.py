"""train.py that saves the loaded state again, as `reloaded` beside the checkpoints.

It then trains, and records the samples of each rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.config.recipe import CheckpointRecipe
from blip_scale.engine import collectives, loop
from blip_scale.engine.checkpoints.location import Place
from blip_scale.engine.checkpoints.save import RunState, Saver
from blip_scale.tasks.pretrain import Pretrain

_train, _inputs = loop._train, Pretrain.inputs


def train_after_a_copy(run: loop.Run) -> int:
    """Save all loaded state before any step, then train."""
    (group,) = run.engine.optimizer.param_groups  # a single group, so weight decay covers all
    assert group["weight_decay"] == run.recipe.optimizer.weight_decay
    state, shared = run.task.state_dict()
    loaded = RunState(run.step, vars(run.history), state, shared)
    rank, world_size = collectives.rank(), collectives.world_size()
    folder = Path(run.recipe.output_dir) / "reloaded"
    place = Place(folder, None, rank, tuple(range(world_size)), world_size)
    saver = Saver(
        place, CheckpointRecipe(), run.engine, run.momentum, lambda *_: None, lambda *_: None
    )
    saver.begin(loaded)
    assert saver.finish()
    return _train(run)


def inputs(self: Pretrain, batch: Any, progress: Any) -> tuple[Any, ...]:
    """Return the inputs of the task, and append the ids of the batch to a file."""
    file = Path(self.recipe.output_dir) / "ids.jsonl"
    line = json.dumps([progress.step, progress.micro_step, collectives.rank(), batch.ids])
    with file.open("a") as stream:
        stream.write(line + "\n")
    return _inputs(self, batch, progress)


if __name__ == "__main__":
    loop._train = train_after_a_copy
    Pretrain.inputs = inputs  # type: ignore[method-assign]
    train.command()
