"""`train.max_micro_batch_size: auto`: the largest micro-batch that fits, settled when a run starts.

By the memory model of the plan, which the tests hold against real runs. Ranks agree on the smallest
of what each finds. A run that goes on keeps the number it began with, because the pairs of a
micro-batch are the pool of local ITM negatives: another number would change its losses.
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
"""Host memory of a loader worker: Python, torch and pinned batches. A rule of thumb."""
_GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")

Settled = tuple[Recipe, dict[str, Any]]
"""A recipe with a number, and DeepSpeed's settings that follow from it."""


def auto(recipe: Recipe, ds_config: str | Path) -> Callable[[torch.device], Settled] | None:
    """What settles the recipe's micro-batch once the ranks have met; None where it is a number."""
    if not is_auto(recipe):
        return None
    return lambda device: settle(recipe, ds_config, device)


def settle(recipe: Recipe, ds_config: str | Path, device: torch.device) -> Settled:
    """Put the largest micro-batch that fits every rank in the place of `auto`; all ranks call.

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
            f"train.max_micro_batch_size: auto finds no room: a micro-batch of {possible[0]} does "
            f"not fit {least / _GIB:.1f} GiB ({place}); give model.gradient_checkpointing=true or "
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
    """The number that a run in this output folder was settled on; None for a first start."""
    file = Path(recipe.output_dir) / run_folder.RECIPE
    try:
        size = yaml.safe_load(file.read_text(encoding="utf-8"))["train"]["max_micro_batch_size"]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return None  # an optional file never stops a run
    return size if isinstance(size, int) else None


def memory_limit(device: torch.device, workers: int, local_ranks: int) -> float:
    """Bytes that a rank may fill: those of its GPU, or its part of the host's free memory, loader
    workers left out."""
    import psutil
    import torch

    if device.type != "cpu":
        return float(torch.cuda.get_device_properties(device).total_memory)
    free = min([psutil.virtual_memory().available, *_free_in_cgroups()])
    return max(0.0, free / local_ranks - workers * WORKER_BYTES)


def load_of(
    recipe: Recipe, ds_config: dict[str, Any], ranks: int, device_type: str, limit: float
) -> Load:
    """What the plan's memory model needs of a run. Captions count at their longest: a run must not
    end on a batch of long ones."""
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
    """Bytes that are left to this process in each cgroup (v2) with a limit, as containers and job
    schedulers set it. File caches count as free."""
    free: list[float] = []
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
    except OSError:
        return free
    folder = _CGROUPS / own
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
