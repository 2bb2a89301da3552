"""ZeRO-3 with compute weights that stay whole on every rank.

The fp32 masters and moments stay partitioned, as DeepSpeed's ZeRO-3 cuts them: each rank owns an
equal part of every flattened parameter. The compute weights are always whole. One flat gather
refreshes them after an optimizer step.

Legend: W ranks, P elements of this rank's parts of some parameters, laid end to end.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from blip_scale.config import weight_placement
from blip_scale.config.recipe import Recipe
from blip_scale.engine import collectives
from blip_scale.engine.zero import deepspeed_patches

_ONE_GROUP = 1_000_000_000
"""Maximum number of elements of an optimizer sub-group, so large that a rank has one group."""
_NEVER = 2**62
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class FlatWeights:
    """Parameters that are whole on every rank, in one flat tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter], parts: Tensor | None = None) -> None:
        """Make partitioned parameters whole.

        Args:
            parameters: parameters under ZeRO-3, all of one dtype.
            parts: [P], this rank's parts of the parameters, if they already lie end to end. None:
                the parts move into a new tensor.
        """
        ranks = collectives.world_size()
        self.parameters = list(parameters)
        self.sizes = [p.ds_tensor.ds_numel for p in self.parameters]
        """Number of elements of a rank's part of each parameter; equal on all ranks."""
        if parts is None:
            parts = torch.cat([p.ds_tensor.data for p in self.parameters])
        self.parts = parts
        """[P]: this rank's parts, which the next `gather` reads."""
        self.is_stale = True
        """Whether the parts have changed since the last `gather`."""
        whole = parts if ranks == 1 else parts.new_empty(ranks * parts.numel())
        flat_blocks = whole.split([ranks * size for size in self.sizes])
        self._blocks = [block.view(ranks, -1) for block in flat_blocks]
        places = parts.split(self.sizes)
        for parameter, part, block in zip(self.parameters, places, flat_blocks, strict=True):
            parameter.ds_tensor.data = part
            parameter.data = block[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def part(self, index: int) -> Tensor:
        """This rank's part of the parameter with this index, a view of `parts`."""
        part: Tensor = self.parameters[index].ds_tensor.data
        return part

    def gather(self) -> None:
        """Join the parts of all ranks in one exchange. Call it on all ranks."""
        self.is_stale = False
        if collectives.world_size() == 1:
            return
        with torch.no_grad():
            everyone = collectives.all_gather(self.parts[None])
            torch.split_with_sizes_copy(everyone, self.sizes, dim=1, out=self._blocks)


def decide(network: nn.Module, recipe: Recipe, ds_config: dict[str, Any]) -> tuple[bool, str]:
    """Whether the weights of a network built under ZeRO-3 stay whole; equal on all ranks.

    Returns:
        The decision, and the reason for the log.
    """
    zero, wanted = ds_config["zero_optimization"], recipe.train.whole_weights
    obstacle = weight_placement.obstacle(zero)
    if not deepspeed_patches.are_checked():
        return False, f"partitioned: {deepspeed_patches.unchecked_reason()}"
    if wanted is False:
        return False, "partitioned: train.whole_weights is false"
    if obstacle:
        return False, f"partitioned: the DeepSpeed JSON sets {obstacle}"
    if wanted is True:
        return True, "whole on every rank: train.whole_weights is true"
    if weight_placement.asks_for_partitioning(zero):
        return False, "partitioned: the DeepSpeed JSON sets stage3_param_persistence_threshold"
    parameters = list(network.parameters())
    trainable = sum(p.ds_numel for p in parameters if p.requires_grad)
    sizes = weight_placement.Sizes(
        trainable,
        sum(p.ds_numel for p in parameters) - trainable,
        collectives.world_size(),
        ds_config["gradient_accumulation_steps"],
        parameters[0].element_size(),
    )
    device = parameters[0].ds_tensor.device
    memory = memory_of(device)
    needed = weight_placement.whole_bytes(sizes)
    limit = weight_placement.SHARE_FOR_STATES * memory
    is_too_large = collectives.any_rank(needed > limit, device)
    kind = "GPU" if device.type == "cuda" else "rank's share of the host's memory"
    figures = (
        f"weights, gradients and optimizer need {needed / 2**30:.1f} GiB, half of the {kind} is "
        f"{limit / 2**30:.1f} GiB"
    )
    where = "partitioned" if is_too_large else "whole on every rank"
    return not is_too_large, f"{where}: {figures}"


def memory_of(device: torch.device) -> float:
    """Bytes of memory of a rank: its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file():  # a container's limit; "max" means none
        limit = _CGROUP_LIMIT.read_text().strip()
        total = min(total, int(limit)) if limit.isdigit() else total
    return total / collectives.local_world_size()


def deepspeed_settings(ds_config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings for weights that stay whole.

    No weight is released, there is one optimizer group, and DeepSpeed makes no buckets.
    """
    settings = copy.deepcopy(ds_config)
    settings["zero_optimization"] |= {
        "stage3_param_persistence_threshold": _NEVER,
        "stage3_model_persistence_threshold": _NEVER,
        "contiguous_gradients": False,
        "sub_group_size": _ONE_GROUP,
    }
    return settings
