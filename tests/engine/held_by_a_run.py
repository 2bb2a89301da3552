"""Stand-in for train.py that measures the memory of tensors in two optimizer steps.

It writes held_RANK.json beside the recipe, with the bytes of all live tensors after the backward
passes (before the update) and after the update. Each storage counts once. The file also has the
bytes of the gathered weights after a forward pass.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale.config import checks, recipe
from blip_scale.engine import collectives
from blip_scale.engine.task import Progress
from blip_scale.engine.zero.engine import ZeroEngine, initialize, start
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.tasks.pretrain import Pretrain


def held() -> int:
    """Return the bytes of all tensors that are visible to Python's garbage collector.

    Activations that only autograd references are not included.
    """
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def gathered(engine: ZeroEngine) -> int:
    """Return the bytes of partitioned weights that are now gathered, without persistent ones."""
    if engine.stage != 3 or collectives.world_size() == 1:
        return 0
    return sum(
        p.numel() * p.element_size()
        for p in engine.module.parameters()
        if p.ds_status is ZeroParamStatus.AVAILABLE and not p.ds_persist
    )


def main() -> None:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    chosen = recipe.load(options["--recipe"])
    device = start(600.0)
    ds_config = checks.resolve_deepspeed(chosen, options["--deepspeed"], collectives.world_size())
    before = held()
    task = Pretrain(chosen, device)
    engine = initialize(task.build_network, chosen, ds_config)
    engine.fill(task.initial_weights())
    momentum = ShardedMomentum(engine, task.momentum_pairs)
    batches = task.batches()
    accumulation = ds_config["gradient_accumulation_steps"]
    sizes = {}
    for step in range(2):
        for index in range(accumulation):
            progress = Progress(step, step * accumulation + index, task.steps_per_epoch)
            outputs = engine.forward(*task.inputs(next(batches), progress))
            task.collect(outputs, progress)
            sizes["gathered"] = gathered(engine)
            engine.backward(outputs["loss/total"], is_last=index == accumulation - 1)
        sizes["backward"] = held() - before
        engine.step(
            1e-3, apply=True, norm=collectives.all_reduce_sum(engine.squared_norms())[0].sqrt()
        )
        task.after_step(engine, momentum, applied=True)
        sizes["update"] = held() - before
    rank = collectives.rank()
    Path(options["--recipe"]).with_name(f"held_{rank}.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main()
