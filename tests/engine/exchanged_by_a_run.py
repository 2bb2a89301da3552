"""Stand-in for train.py that counts the collectives of an optimizer step.

It takes three steps, counts in the last one, and writes exchanged_RANK.json beside the recipe: the
calls and bytes for each part of the step and each kind of collective. For the forward pass, the
file also has the bytes of prefetched gathers, which start before the module that needs them is
called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale.engine.watching.communication import CommunicationMeter

STEPS = 3  # DeepSpeed records the order of the modules in the first two steps


class Gathers:
    """Record the module call at which each gather starts, and the one at which it is awaited."""

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = {"ahead": 0, "at once": 0}
        register_module_forward_pre_hook(self._count)
        self._gather: Callable[..., Any] = dist.all_gather_into_tensor
        dist.all_gather_into_tensor = self._noted

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def _noted(self, *arguments: Any, **named: Any) -> Any:
        work = self._gather(*arguments, **named)
        whole: Tensor = named["output_tensor"] if named else arguments[0]
        size = whole.numel() * whole.element_size()
        if work is None:
            self.bytes["at once"] += size
            return None
        begun, wait = self.calls, work.wait

        def noted_wait(*arguments_of_wait: Any) -> Any:
            self.bytes["ahead" if self.calls > begun else "at once"] += size
            return wait(*arguments_of_wait)

        work.wait = noted_wait
        return work


def main() -> None:
    meter = CommunicationMeter()
    meter.install()
    gathers = Gathers()

    from blip_scale.config import checks, recipe
    from blip_scale.engine import collectives
    from blip_scale.engine.task import Progress
    from blip_scale.engine.zero.engine import initialize, start
    from blip_scale.engine.zero.momentum import ShardedMomentum
    from blip_scale.tasks.pretrain import Pretrain

    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    chosen = recipe.load(options["--recipe"])
    device = start(600.0)
    ds_config = checks.resolve_deepspeed(chosen, options["--deepspeed"], collectives.world_size())
    task = Pretrain(chosen, device)
    engine = initialize(task.build_network, chosen, ds_config)
    engine.fill(task.initial_weights())
    momentum = ShardedMomentum(engine, task.momentum_pairs)
    batches = task.batches()
    costs: dict[str, Any] = {}

    def note(part: str) -> None:
        costs[part] = {kind: asdict(cost) for kind, cost in meter.costs.items()}
        meter.reset()

    for step in range(STEPS):
        batch = next(batches)
        meter.reset()
        gathers.bytes = dict.fromkeys(gathers.bytes, 0)
        progress = Progress(step, step, task.steps_per_epoch)
        losses = engine.forward(*task.inputs(batch, progress))
        task.collect(losses, progress)
        note("forward")
        costs["prefetch"] = dict(gathers.bytes)
        engine.backward(losses["loss/total"], is_last=True)
        note("backward")
        engine.step(
            1e-3, apply=True, norm=collectives.all_reduce_sum(engine.squared_norms())[0].sqrt()
        )
        note("update")
        task.after_step(engine, momentum, applied=True)
        note("momentum")
    rank = collectives.rank()
    Path(options["--recipe"]).with_name(f"exchanged_{rank}.json").write_text(json.dumps(costs))


if __name__ == "__main__":
    main()
