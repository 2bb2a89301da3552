"""What the ranks of a run hold: a stand-in for train.py that trains two steps and counts bytes.

Writes `held_RANK.json` beside the recipe: bytes of all tensors alive after the backward passes of a
step (before the update) and after it, each storage once.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from pathlib import Path

from blip_scale import checks, recipe

from blip_scale.engine import collectives
from blip_scale.engine.deepspeed import initialize, start
from blip_scale.engine.sharded_momentum import ShardedMomentum
from blip_scale.engine.task import Progress
from blip_scale.tasks import Pretrain

import torch


def held(detail: list | None = None) -> Counter:
    """Bytes of the tensors that are alive, by type; a storage counts once, by who holds most."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = (str(thing.dtype), storage.nbytes())
    if detail is not None:
        detail += sorted(storages.values(), key=lambda x: -x[1])[:40]
    found: Counter = Counter()
    for name, size in storages.values():
        found[name] += size
    return found


def main() -> None:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    chosen = recipe.load(options["--recipe"])
    device = start()
    world_size = collectives.world_size()
    ds_config = checks.resolve_deepspeed(chosen, options["--deepspeed"], world_size)
    before = held()
    task = Pretrain(chosen, device)
    engine = initialize(task.build_network, chosen, ds_config)
    engine.fill(task.initial_weights())
    momentum = ShardedMomentum(engine, task.momentum_pairs)
    batches = task.batches()
    accumulation = ds_config["gradient_accumulation_steps"]
    found, detail = {}, {}
    for step in range(2):
        for index in range(accumulation):
            micro_step = step * accumulation + index
            progress = Progress(step, micro_step, task.steps_per_epoch)
            losses = task.losses(engine.deepspeed, next(batches), progress)
            engine.deepspeed.backward(losses["loss/total"])
            if index < accumulation - 1:
                engine.deepspeed.step()
        del losses
        for name, act in (("backward", lambda: None), ("update", lambda: (engine.step(1e-3, True), task.after_step(engine, momentum, True)))):
            act()
            detail[name] = []
            found[name] = dict(held(detail[name]) - before)
    out = Path(options["--recipe"]).with_name(f"held_{collectives.rank()}.json")
    out.write_text(json.dumps({"found": found, "detail": detail, "before": before}))


if __name__ == "__main__":
    main()
