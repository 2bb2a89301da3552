"""Collective operations that tasks and the loop need.

Legend: B batch of one rank, W ranks.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor


def rank() -> int:
    """Rank of this process among all, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of ranks on this machine, from the launcher's variables.

    Raises:
        KeyError: several ranks run, and the launcher set no variable.
    """
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    if world_size() == 1:
        return 1
    raise KeyError("LOCAL_WORLD_SIZE is not set: set it to the number of ranks of each machine")


def barrier() -> None:
    """Wait until every rank has called this."""
    if world_size() > 1:
        dist.barrier()


def all_gather(tensor: Tensor) -> Tensor:
    """[B, ...] of every rank -> [W * B, ...] in rank order, without gradient. B is equal on all."""
    if world_size() == 1:
        return tensor.detach()
    everyone = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(everyone, tensor.detach().contiguous())
    return everyone


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """[B, ...] -> [W * B, ...] in rank order. The backward sums the gradients of all ranks."""
    if world_size() == 1:
        return tensor
    return torch.cat(dist_nn.all_gather(tensor.contiguous()))


def all_gather_ragged(tensor: Tensor) -> list[Tensor]:
    """[B_r, ...] of every rank -> the tensors in rank order, without gradient. B_r may differ."""
    if world_size() == 1:
        return [tensor.detach()]
    sizes = all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    parts = all_gather(padded).unflatten(0, (len(sizes), max(sizes)))
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def all_gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order. Values must be picklable."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place. Returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is True on any rank, so that all ranks take the same branch."""
    return bool(all_reduce_sum(torch.tensor([float(flag)], device=device)).item() > 0)


def time_all_reduce(size_bytes: int, device: torch.device) -> float:
    """Seconds that an all-reduce of `size_bytes` takes: the best of three after a warm-up.

    Call it on all ranks.
    """
    values = torch.ones(size_bytes // 4, device=device)
    seconds = []
    for _ in range(4):
        values.fill_(1.0)
        barrier()
        began = time.perf_counter()
        total = float(all_reduce_sum(values)[-1])  # waits for the device
        seconds.append(time.perf_counter() - began)
        if total != world_size():
            raise RuntimeError(f"a sum of ones over {world_size()} ranks gave {total}")
    return min(seconds[1:])
