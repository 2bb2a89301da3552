"""Memory of a GPU by use, and the largest micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blip_scale.config.batch_sizes import token_bucket
from blip_scale.config.recipe import Recipe
from blip_scale.planning.activations import (
    Micro,
    packed_tokens,
    saved_activations,
    temporaries,
)
from blip_scale.planning.network import Network
from blip_scale.planning.states import Sharding, states

RESERVE_BYTES = 1.5 * 2**30
"""Bytes of CUDA's context and of NCCL's and cuBLAS's buffers."""
FRAGMENTATION = 0.05
"""Memory that the allocator holds in addition to the tensors, as a share of the tensors."""
HEADROOM = 0.1
"""Share of the memory that a proposed micro-batch leaves free. It exceeds the error of the
estimates of states and activations in the tests."""
_LARGEST = 2**16  # bound for a device whose memory is unknown


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step, and bytes of the host for each rank."""

    terms: dict[str, float]
    total: float
    host: float


@dataclass(frozen=True)
class Load:
    """Everything that determines the memory of a micro-batch, except its size."""

    network: Network
    sharding: Sharding
    tokens_each: float
    """Mean number of tokens of a caption."""
    share: int
    """Pairs per optimizer step on a rank."""
    bucket: Callable[[int], int]
    """Function from the size of a micro-batch to the multiple to which its tokens are padded."""
    on_cpu: bool = False

    @staticmethod
    def of(
        recipe: Recipe,
        network: Network,
        sharding: Sharding,
        tokens_each: float,
        on_cpu: bool = False,
    ) -> Load:
        """Create the load of a recipe's network on a rank."""
        share = recipe.train.global_batch_size // sharding.ranks

        def bucket(batch: int) -> int:
            return token_bucket(recipe, batch, on_gpu=not on_cpu)

        return Load(network, sharding, tokens_each, share, bucket, on_cpu)

    def tokens(self, batch: int) -> int:
        """Number of tokens of a micro-batch, including padding."""
        return packed_tokens(batch, self.tokens_each, self.bucket(batch))


def memory(load: Load, batch: int) -> Memory:
    """Memory of a rank with micro-batches of `batch` pairs."""
    network, sharding = load.network, load.sharding
    keys = network.contrast.key_count(batch)
    losses = network.decodes, network.matches
    micro = Micro(batch, load.tokens(batch), sharding.compute_bytes, keys, load.on_cpu, *losses)
    held = states(network, sharding, max(1, load.share // batch))
    checkpointing = network.config.gradient_checkpointing
    saved = saved_activations(network.config, network.vision, micro, checkpointing)
    passing = temporaries(network.config, network.vision, micro)
    running = {
        **held.backward,
        **{f"activations_{name}": value for name, value in saved.items()},
        **{f"temporary_{name}": value for name, value in passing.items()},
    }
    if sum(held.update.values()) > sum(running.values()):  # the peak is in the update
        running = {f"update_{name}": value for name, value in held.update.items()}
    terms = {**held.resting, **running}
    tensors = sum(terms.values())
    terms |= {"context_and_nccl": RESERVE_BYTES, "fragmentation": FRAGMENTATION * tensors}
    terms = {name: value for name, value in terms.items() if value}
    return Memory(terms, sum(terms.values()), sum(held.host.values()))


def largest_micro_batch(load: Load, limit: float) -> int:
    """Largest micro-batch whose memory is at most `limit` bytes; 0 if none fits."""

    def fits(batch: int) -> bool:
        return memory(load, batch).total <= limit

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


def roomy_micro_batch(load: Load, possible: Sequence[int], limit: float) -> int:
    """Largest of the `possible` micro-batches that leaves HEADROOM of `limit` free; 0 if none."""
    fitting = [n for n in possible if memory(load, n).total <= (1 - HEADROOM) * limit]
    return max(fitting, default=0)
