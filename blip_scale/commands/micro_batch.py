"""Resolve `train.max_micro_batch_size: auto` when a run starts.

The planner's memory model gives the largest micro-batch that fits. Tests compare the model with
real runs. All ranks use the smallest of their results. A resumed run keeps its micro-batch size:
local ITM negatives come from the same micro-batch, so another size would change the losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from blip_scale.config import checks
from blip_scale.config.batch_sizes import (
    batch_sizes,
    is_auto,
    possible_micro_batches,
    settled,
)
from blip_scale.config.recipe import Recipe
from blip_scale.storage import run_folder

if TYPE_CHECKING:
    import torch

    from blip_scale.planning.memory import Load

logger = logging.getLogger(__name__)

WORKER_BYTES = 1e9
"""Estimated host memory of a loader worker (rule of thumb): Python, torch and pinned batches."""
_GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")

Settled = tuple[Recipe, dict[str, Any]]
"""Recipe with a number instead of `auto`, and the DeepSpeed settings for it."""


def auto(recipe: Recipe, ds_config: str | Path) -> Callable[[torch.device], Settled] | None:
    """Return a function that resolves `auto` once all ranks are connected.

    Return None if the recipe gives a number.
    """
    if not is_auto(recipe):
        return None
    return lambda device: settle(recipe, ds_config, device)


def settle(recipe: Recipe, ds_config: str | Path, device: torch.device) -> Settled:
    """Replace `auto` with the largest micro-batch that fits on every rank.

    This is a collective: all ranks must call it.

    Raises:
        ValueError: not even the smallest micro-batch fits.
    """
    from blip_scale.engine import collectives
    from blip_scale.planning.memory import roomy_micro_batch

    ranks = collectives.world_size()
    limit = memory_limit(device, recipe.data.workers, collectives.local_world_size())
    resolved = checks.resolve_deepspeed(recipe, ds_config, ranks)
    possible = possible_micro_batches(recipe, ranks)
    load = load_of(recipe, resolved, ranks, device.type, limit)
    fitting = roomy_micro_batch(load, possible, limit)
    micro_batch, least = min(collectives.all_gather_objects((fitting, limit)))
    before = micro_batch_before(recipe)
    place = "host memory a rank" if device.type == "cpu" else "the card"
    if micro_batch == 0:
        raise ValueError(
            "train.max_micro_batch_size: auto finds no size that fits: a micro-batch of "
            f"{possible[0]} does "
            f"not fit {least / _GIB:.1f} GiB ({place}); set model.gradient_checkpointing=true or "
            "--deepspeed ds_configs/zero3_offload.json"
        )
    why = f"the largest that fits {least / _GIB:.1f} GiB ({place}) with headroom and divides"
    if before is not None and before <= micro_batch:
        micro_batch, why = before, "as this run began"
    elif before is not None:
        why += f", {before} when this run began"
    chosen = settled(recipe, micro_batch)
    sizes = batch_sizes(chosen, ranks)
    logger.info(
        "train.max_micro_batch_size: auto takes %d pairs a micro-batch, %d micro-steps: %s",
        sizes.micro_batch, sizes.accumulation, why,
    )  # fmt: skip
    return chosen, checks.resolve_deepspeed(chosen, ds_config, ranks)


def micro_batch_before(recipe: Recipe) -> int | None:
    """Return the micro-batch size chosen when the run first started; None on the first start."""
    file = Path(recipe.output_dir) / run_folder.RECIPE
    try:
        size = yaml.safe_load(file.read_text(encoding="utf-8"))["train"]["max_micro_batch_size"]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return None  # a missing or damaged optional file must not stop a run
    return size if isinstance(size, int) else None


def memory_limit(device: torch.device, workers: int, local_ranks: int) -> float:
    """Return the bytes that a rank may use: its GPU's memory, or its share of free host memory.

    On the CPU, the memory of the loader workers is subtracted.
    """
    import psutil
    import torch

    if device.type != "cpu":
        return float(torch.cuda.get_device_properties(device).total_memory)
    free = min([psutil.virtual_memory().available, *_free_in_cgroups()])
    return max(0.0, free / local_ranks - workers * WORKER_BYTES)


def load_of(
    recipe: Recipe, ds_config: dict[str, Any], ranks: int, device_type: str, limit: float
) -> Load:
    """Build the input of the planner's memory model for a run.

    All captions are assumed to have the maximum length, so that a batch of long captions cannot
    run out of memory.
    """
    from blip_scale.planning.memory import Load
    from blip_scale.planning.network import network_of
    from blip_scale.planning.states import Sharding, placed
    from blip_scale.tasks.by_name import contrast_of

    size = 2 if recipe.train.precision == "bf16" else 4
    network = network_of(recipe, contrast_of)
    sharding = Sharding.of(ds_config, ranks, size)
    sharding = placed(sharding, recipe, ds_config["zero_optimization"], network, limit)
    longest = recipe.model.text.max_tokens
    return Load.of(recipe, network, sharding, longest, device_type == "cpu")


def _free_in_cgroups() -> list[float]:
    """Return the free bytes in each cgroup (v2) of this process that has a memory limit.

    Containers and job schedulers set such limits. The page cache counts as free.
    """
    free: list[float] = []
    try:
        group_name = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
    except OSError:
        return free
    folder = _CGROUPS / group_name
    for group in [folder, *folder.parents]:
        if not group.is_relative_to(_CGROUPS):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                held = int((group / "memory.current").read_text())
                stat = dict(line.split() for line in (group / "memory.stat").open())
                free.append(float(limit) - held + int(stat["file"]))
        except (OSError, KeyError, ValueError):
            continue
    return free
