"""Memory of a GPU, term by term, and the largest micro-batch that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blip_scale.planning.activations import Micro, saved_activations, temporaries
from blip_scale.planning.network import Network
from blip_scale.planning.states import Sharding, states

RESERVE_BYTES = 1.5 * 2**30
"""CUDA's context, NCCL's and cuBLAS's buffers."""
FRAGMENTATION = 0.05
"""Part of the tensors' memory that the allocator holds beside it."""
_LARGEST = 2**16  # nobody asks for more; and a device of unknown memory takes any


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the fullest moment of a step, and of the host a rank."""

    terms: dict[str, float]
    total: float
    host: float


def memory(
    network: Network, sharding: Sharding, batch: int, queue_size: int, tokens_each: float
) -> Memory:
    """Memory of a rank that takes micro-batches of `batch` captions of `tokens_each` tokens."""
    tokens = math.ceil(batch * tokens_each)
    micro = Micro(batch, tokens, sharding.compute_bytes, queue_size)
    held = states(network, sharding, queue_size)
    checkpointing = network.config.gradient_checkpointing
    saved = saved_activations(network.config, network.vision, micro, checkpointing)
    passing = temporaries(network.config, network.vision, micro)
    running = {
        **held.backward,
        **{f"activations_{name}": value for name, value in saved.items()},
        **{f"temporary_{name}": value for name, value in passing.items()},
    }
    if sum(held.update.values()) > sum(running.values()):  # the update is the fullest moment
        running = {f"update_{name}": value for name, value in held.update.items()}
    terms = {**held.resting, **running}
    tensors = sum(terms.values())
    terms |= {"context_and_nccl": RESERVE_BYTES, "fragmentation": FRAGMENTATION * tensors}
    terms = {name: value for name, value in terms.items() if value}
    return Memory(terms, sum(terms.values()), sum(held.host.values()))


def largest_micro_batch(
    network: Network, sharding: Sharding, queue_size: int, tokens_each: float, limit: float
) -> int:
    """The largest micro-batch whose memory stays below `limit` bytes; 0 when not even one pair
    fits."""

    def fits(batch: int) -> bool:
        return memory(network, sharding, batch, queue_size, tokens_each).total <= limit

    if not fits(1):
        return 0
    high = 1
    while high < _LARGEST and fits(2 * high):
        high *= 2
    low = high
    high *= 2
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
