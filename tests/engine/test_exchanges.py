"""A ZeRO-3 step communicates exactly the bytes that the network's uses of its weights need."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkedProcess
from tiny_runs import REPO, WIDER, finish, launch, make_recipe, said

from blip_scale.config import recipe
from blip_scale.config.recipe import Recipe
from blip_scale.engine.task import Progress
from blip_scale.engine.zero import engine
from blip_scale.engine.zero.gradient_buckets import bucket_ranges
from blip_scale.planning.network import network_of
from blip_scale.tasks.by_name import contrast_of
from blip_scale.tasks.pretrain import Pretrain

pytestmark = pytest.mark.multiprocess
PERSISTENT = 300
"""Largest number of elements of a parameter that is whole on every rank."""
KEEPS, RELEASES = 1e9, 0
"""Values of DeepSpeed's limit for elements that stay gathered for reuse: keep all, release all."""


@dataclass(frozen=True)
class Use:
    """A module with weights, called by the network."""

    module: str
    numels: tuple[int, ...]
    """Number of elements of each of its partitioned weights."""
    trains: bool


def uses_of(chosen: Recipe) -> Counter[Use]:
    """Count the calls of each module in a step, with a plain network in this process."""
    task = Pretrain(chosen, engine.start(60.0))
    network, uses = task.build_network(), Counter[Use]()
    for name, module in network.named_modules():
        parameters = [*module.parameters(recurse=False)]
        large = tuple(p.numel() for p in parameters if p.numel() > PERSISTENT)
        if large:
            use = Use(name, large, parameters[0].requires_grad)
            module.register_forward_pre_hook(lambda *_, use=use: uses.update([use]))
    weights = task.initial_weights()
    for name, parameter in network.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name].view_as(parameter))
    with torch.no_grad():
        network(*task.inputs(next(task.batches()), Progress(0, 0, task.steps_per_epoch)))
    return uses


def partitioned(live: float, prefetch: float) -> dict[str, Any]:
    """Return DeepSpeed's settings for partitioned weights."""
    return {
        "stage3_param_persistence_threshold": PERSISTENT,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "stage3_prefetch_bucket_size": prefetch,
    }


def exchanged(folder: Path, ranks: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the step, and return the costs counted by each rank."""
    config = json.loads((REPO / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"] |= settings
    file, ds_config = folder / "recipe.yaml", folder / "ds_config.json"
    ds_config.write_text(json.dumps(config))
    script = Path(__file__).with_name("exchanged_by_a_run.py")
    processes = launch(file, ranks, "--deepspeed", str(ds_config), stage=3, script=script)
    assert all(isinstance(process, ForkedProcess) for process in processes), "uses_of left traces"
    codes = finish(processes)
    assert codes == [0] * ranks, said(file)
    files = [folder / f"exchanged_{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files]


def test_a_step_sends_what_its_uses_of_the_weights_need(tmp_path: Path) -> None:
    """Four ranks gather released weights for each use, in the forward and the backward pass.

    In the backward pass, embeddings are released only at the end, so they are gathered once. If all
    weights are kept, each is gathered once. In both cases, gradients are reduced once.
    """
    ranks = 4
    chosen = recipe.load(str(make_recipe(tmp_path, model=WIDER)))
    network, uses = network_of(chosen, contrast_of), uses_of(chosen)
    again = {use for use, count in uses.items() if count == 2}
    assert any("layers" in use.module for use in again) and max(uses.values()) == 2

    def whole(numels: Iterable[int]) -> int:
        """Return the bytes of large parameters, padded to a multiple of the number of ranks."""
        return 4 * sum(-(-numel // ranks) * ranks for numel in numels if numel > PERSISTENT)

    forward = sum(count * whole(use.numels) for use, count in uses.items())
    backward = 0
    for use, count in uses.items():
        if use.trains:
            backward += whole(use.numels) * (1 if "embeddings" in use.module else count)
    trained = whole(network.trainable)
    staying = small([*network.trainable, *network.momentum], ranks)
    for live, gathered in (
        (RELEASES, (forward, backward)),
        (KEEPS, (trained + whole(network.momentum), 0)),
    ):
        for costs in exchanged(tmp_path, ranks, partitioned(live, prefetch=0)):
            assert costs["forward"]["all_gather"]["bytes"] == gathered[0] + staying
            assert costs["backward"]["all_gather"]["bytes"] == gathered[1]
            reduced = costs["backward"]["reduce_scatter"]["bytes"]
            assert reduced == trained + small(network.trainable, ranks)
            assert costs["update"]["all_gather"]["calls"] == 0
            assert costs["update"]["all_reduce"]["calls"] == 1  # the norms of the gradients
            assert costs["momentum"]["all_gather"]["calls"] == 2  # features
            for part in ("update", "momentum"):
                assert costs[part]["reduce_scatter"]["calls"] == 0
            assert costs["prefetch"]["ahead"] == 0


def test_whole_weights_are_gathered_at_once_and_gradients_go_in_buckets(tmp_path: Path) -> None:
    """Two ranks gather all trainable weights at once, and all momentum copies at once.

    The gradients fit into two buckets, with one reduction per bucket.
    """
    chosen = recipe.load(str(make_recipe(tmp_path, model=WIDER)))
    network = network_of(chosen, contrast_of)
    limit = sum(network.trainable) // 2 + max(network.trainable)
    buckets = bucket_ranges(network.trainable, limit)
    assert len(buckets) == 2
    trained, copied = whole_bytes(network.trainable, 2), whole_bytes(network.momentum, 2)
    for costs in exchanged(tmp_path, 2, {"reduce_bucket_size": limit}):
        assert costs["forward"]["all_gather"]["calls"] == 2
        assert costs["forward"]["all_gather"]["bytes"] == trained + copied
        assert costs["backward"]["reduce_scatter"]["calls"] == 2
        assert costs["backward"]["reduce_scatter"]["bytes"] == trained
        assert costs["backward"]["all_gather"]["calls"] == 0
        assert costs["update"]["all_reduce"]["calls"] == 1  # the norm of the gradient
        assert costs["momentum"]["all_gather"]["calls"] == 2  # features
        for part in ("update", "momentum"):
            assert costs[part]["reduce_scatter"]["calls"] == 0
        assert costs["update"]["all_gather"]["calls"] == 0


def whole_bytes(numels: Iterable[int], ranks: int) -> int:
    """Return the bytes of whole fp32 parameters, padded to a multiple of the number of ranks."""
    return 4 * sum(-(-numel // ranks) * ranks for numel in numels)


def small(numels: Iterable[int], ranks: int) -> int:
    """Return the bytes of persistent parameters, padded to a multiple of the number of ranks."""
    return 4 * sum(-(-numel // ranks) * ranks for numel in numels if numel <= PERSISTENT)


def test_prefetching_begins_every_gather_before_its_module(tmp_path: Path) -> None:
    """Once the order of modules is known, all gathers except those of whole weights can overlap."""
    chosen = recipe.load(str(make_recipe(tmp_path, model=WIDER)))
    network = network_of(chosen, contrast_of)
    staying = small([*network.trainable, *network.momentum], 2)
    for costs in exchanged(tmp_path, 2, partitioned(KEEPS, prefetch=40_000)):
        gathered = costs["forward"]["all_gather"]["bytes"]
        assert costs["prefetch"] == {"ahead": gathered - staying, "at once": staying}
