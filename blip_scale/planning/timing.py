"""Estimate the seconds of an optimizer step: kernels, host, exchanges and update.

An exchange is a collective operation between ranks. A micro-step takes as long as the slowest of
kernels, host and overlapped exchanges. Other exchanges are added. Each assumption has a slow, an
expected and a fast value, so a plan gives a range. The figures come from one H200
(docs/performance.md, "On a GPU"; 2026-11-29, bf16, micro-batch 64, before the engine's redundant
work was removed):

    plain PyTorch               0.198 s a step
    ZeRO-3 on one rank          0.405 s a step
    kernels alone (profiler)    0.067 s a step: 189 TFLOP/s, 19 % of the card's 989

A step calls 393 modules with weights, forward and backward. The host therefore took 250 us per call
in plain PyTorch and 515 us under ZeRO-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from blip_scale.config.batch_sizes import BatchSizes
from blip_scale.model.flops import med_flops, recomputation_flops
from blip_scale.planning.hardware import GPU, GPUS
from blip_scale.planning.network import Network
from blip_scale.planning.states import Sharding

MOST_REDUCTIONS = 12
"""Maximum number of gradient reductions per backward pass if weights stay gathered."""

Level = Literal["slow", "expected", "fast"]
LEVELS: tuple[Level, ...] = ("fast", "expected", "slow")


@dataclass(frozen=True)
class Assumed:
    """An assumed quantity with its bounds."""

    slow: float
    expected: float
    fast: float

    def at(self, level: Level) -> float:
        """Value at a level."""
        return float(getattr(self, level))


@dataclass(frozen=True)
class Execution:
    """One way to execute the forward and backward passes of a step."""

    name: str
    whole: bool
    """Whether each rank holds all weights during the passes."""
    module_s: Assumed
    """Host seconds per call of a module with weights in one pass: Python, hooks and kernel
    launches."""
    micro_step_s: Assumed
    """Additional host seconds per micro-step."""
    fused: Assumed
    """Speed of the bf16 kernels relative to eager ones. Not used in fp32, where matrix products
    dominate."""
    evidence: str


_NOTHING = Assumed(0.0, 0.0, 0.0)
_EAGER = Assumed(1.0, 1.0, 1.0)

EXECUTIONS = {
    # Fast: measured in plain PyTorch. Expected and slow: 0.25 and 0.30 s per step on one rank, from
    # the estimate for the engine without redundant work (0.22 to 0.30 s).
    "whole": Execution(
        "eager, weights whole", True, Assumed(380e-6, 320e-6, 250e-6), _NOTHING, _EAGER,
        "estimated between plain PyTorch and ZeRO-3 as measured",
    ),
    # Slow: measured with DeepSpeed's hooks around each weight, under ZeRO-3 on one rank. Fast: the
    # expected value for whole weights.
    "partitioned": Execution(
        "eager, weights partitioned", False, Assumed(515e-6, 415e-6, 320e-6), _NOTHING, _EAGER,
        "slow value measured on one rank, never run on several GPUs",
    ),
    # Replaying a graph costs the host almost nothing; loader, metrics and optimizer remain. In
    # published ViT-B/16 results (JAX, A100), fused kernels reach at most 30 % of the peak. Eager
    # kernels were measured at 19 %.
    "graph": Execution(
        "CUDA graph, weights whole", True, _NOTHING, Assumed(20e-3, 10e-3, 2e-3),
        Assumed(1.0, 1.0, 1.6), "estimated from the kernels alone",
    ),
}  # fmt: skip
"""Name of `--way` -> execution of the step."""

LINK_EFFICIENCY = Assumed(0.5, 0.7, 0.85)
"""Share of a link's bandwidth that collectives reach. A guess."""
COLLECTIVE_LATENCY_S = Assumed(50e-6, 25e-6, 10e-6)
"""Latency of an exchange between two ranks. A collective takes log2(ranks) times this. A guess."""
BF16_EFFICIENCY = 0.19
"""Share of the peak that the eager kernels of a step reach, measured on the H200."""
_ONE_MEASUREMENT = 0.25
"""Relative uncertainty of the kernels' speed: only one card and micro-batch were measured."""
FP32_EFFICIENCY = Assumed(0.40, 0.45, 0.50)
"""Share of the fp32 peak that kernels reach. The published code reached 43 % on the H200 at
micro-batch 32. Its author's 30 pairs/s per A100 correspond to 47 %."""


@dataclass(frozen=True)
class Cluster:
    """Machines, and overrides of their assumed speed."""

    nodes: int
    gpus_per_node: int
    gpu: GPU
    efficiency: float | None = None
    """Share of the peak of matrix products that kernels reach. None uses the measured value."""
    module_call_s: float | None = None
    """Host seconds per call of a module in eager execution. None uses the measured value."""

    @property
    def ranks(self) -> int:
        """Number of GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    def exchange_s(self, data_bytes: float, collectives: float, level: Level) -> float:
        """Seconds to all-gather or reduce-scatter `data_bytes` in `collectives` calls.

        A ring over all ranks crosses the network of each node once, using all its network cards.
        """
        if self.ranks == 1:
            return 0.0
        link = self.gpu.link_gb_s if self.gpus_per_node > 1 else math.inf
        network = self.gpu.network_gbit / 8 if self.nodes > 1 else math.inf
        bandwidth = min(link, network) * 1e9 * LINK_EFFICIENCY.at(level)
        latency = COLLECTIVE_LATENCY_S.at(level) * math.log2(self.ranks) * collectives
        return data_bytes * (self.ranks - 1) / self.ranks / bandwidth + latency


def peak_flops(gpu: GPU, compute_bytes: int) -> float:
    """Peak of matrix products in FLOP/s. A GPU without bf16 units computes bf16 as fp32."""
    peak = gpu.bf16_tflops if compute_bytes == 2 else None
    return (peak or gpu.fp32_tflops) * 1e12


def kernel_flops(cluster: Cluster, compute_bytes: int) -> Assumed:
    """FLOP/s that the eager kernels of a step reach.

    In bf16 they are limited by memory rather than by the matrix units: published utilisations of
    ViT-B/16 follow memory bandwidth (A100 29 % of the peak, H100 16 %). The H200's figure is
    therefore scaled by bandwidth. Scaling it by the peak gives the other bound.
    """
    gpu, peak = cluster.gpu, peak_flops(cluster.gpu, compute_bytes)
    if cluster.efficiency is not None:
        rate = cluster.efficiency * peak
        return Assumed(rate, rate, rate)
    if compute_bytes == 4 or gpu.bf16_tflops is None:
        share = FP32_EFFICIENCY
        return Assumed(share.slow * peak, share.expected * peak, share.fast * peak)
    measured = GPUS["h200"]
    by_peak = BF16_EFFICIENCY * peak
    bandwidth = gpu.memory_gb_s / measured.memory_gb_s
    by_bandwidth = BF16_EFFICIENCY * peak_flops(measured, 2) * bandwidth
    slow, fast = sorted((by_peak, by_bandwidth))
    return Assumed(
        slow * (1 - _ONE_MEASUREMENT), by_bandwidth, min(peak, fast * (1 + _ONE_MEASUREMENT))
    )


@dataclass(frozen=True)
class Work:
    """Description of an optimizer step whose time is estimated."""

    network: Network
    sharding: Sharding
    sizes: BatchSizes
    tokens: int
    """Number of tokens of all captions in a micro-batch."""


@dataclass(frozen=True)
class Exchange:
    """All exchanges of one kind in an optimizer step of a rank."""

    name: str
    calls: int
    data_bytes: float
    """Bytes of the gathered or reduced tensors, in full size."""
    seconds: float
    hidden: bool
    """Whether the exchanges can overlap computation if DeepSpeed's settings allow it."""


def exchanges(work: Work, cluster: Cluster, level: Level = "expected") -> tuple[Exchange, ...]:
    """Exchanges between ranks in an optimizer step; none on one rank.

    If weights stay gathered, they are gathered in one exchange after the update, and momentum
    copies in another. Gradients are reduced in buckets, under ZeRO-3 once per step. Partitioned
    weights are gathered in every micro-step, with one exchange for each module whose weights exceed
    the persistence threshold. Prefetching merges some of these.
    """
    if cluster.ranks == 1:
        return ()
    network, sharding, sizes = work.network, work.sharding, work.sizes
    size, micro_steps = sharding.compute_bytes, sizes.accumulation
    trained, still, copied = map(sum, (network.trainable, network.frozen, network.momentum))
    buckets = math.ceil(trained / sharding.reduce_bucket)
    if not sharding.partitions:
        buckets = min(buckets, MOST_REDUCTIONS)

    def exchange(name: str, calls: int, elements: float, hidden: bool) -> Exchange:
        data_bytes = size * elements
        seconds = cluster.exchange_s(data_bytes, calls, level)
        return Exchange(name, calls, data_bytes, seconds, hidden)

    once = sharding.stage == 1 or (sharding.stage == 3 and sharding.whole)
    reductions = 1 if once else micro_steps
    listed = [exchange("reductions", buckets * reductions, trained * reductions, hidden=True)]
    if sharding.partitions:
        modules = sum(numel > sharding.persistent for numel in network.module_parameters)
        elements = (trained + still + copied) * micro_steps
        listed.insert(0, exchange("gathers", modules * micro_steps, elements, hidden=True))
    else:
        calls = 2 if copied else 1
        listed.insert(0, exchange("gathers", calls, trained + copied, hidden=False))
    if network.contrast_bytes or network.contrast.exchanges:
        # fp32 keys of both modalities from all ranks.
        features = 2 * 4 * network.config.embed_dim * sizes.global_batch / size
        listed.append(exchange("features", 2 * micro_steps, features, hidden=False))
    return tuple(listed)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every rank."""

    kernels_s: float
    host_s: float
    exchanges_s: float
    """Seconds of exchanges of weights and gradients, which overlap with kernels and host."""
    update_s: float
    """Seconds of the optimizer, the momentum copies, and exchanges without overlap."""
    total_s: float
    flops: float
    """FLOPs of one rank, including recomputation."""
    useful_flops: float
    """FLOPs of one rank without recomputation."""
    mfu: float
    """Model FLOPs utilisation: `useful_flops` per second, as a share of the peak."""
    limit: str
    """Name of the slowest part: kernels, host or exchanges."""


def step_time(
    work: Work, cluster: Cluster, execution: Execution, level: Level = "expected"
) -> StepTime:
    """Estimate an optimizer step with all assumptions at one level."""
    network, sharding, sizes = work.network, work.sharding, work.sizes
    size, micro_steps = sharding.compute_bytes, sizes.accumulation
    losses = network.decodes, network.matches
    useful = med_flops(network.config, sizes.micro_batch, work.tokens, *losses)
    useful += network.contrast.flops(network.config, sizes.micro_batch, work.tokens)
    recomputed, passes = 0.0, 2
    if network.config.gradient_checkpointing:
        recomputed = recomputation_flops(network.config, sizes.micro_batch, work.tokens, *losses)
        passes = 3
    fused = execution.fused.at(level) if size == 2 else 1.0
    kernels = (useful + recomputed) / (kernel_flops(cluster, size).at(level) * fused)
    call = execution.module_s.at(level)
    if call and cluster.module_call_s is not None:
        call = cluster.module_call_s
    host = network.modules * passes * call + execution.micro_step_s.at(level)
    listed = exchanges(work, cluster, level)
    hidden = sum(item.seconds for item in listed if item.hidden) / micro_steps
    owned = sum(network.trainable) / sizes.world_size
    # Per element, AdamW moves 9 fp32 values through memory, and the momentum averages 3.
    update = owned * (9 * 4 + 3 * 4) / (cluster.gpu.memory_gb_s * 1e9)
    update += sum(item.seconds for item in listed if not item.hidden)
    if sharding.offload:
        # Gradients go to the host and weights return over PCIe (25 GB/s). Per element, AdamW moves
        # 7 fp32 values through host memory (20 GB/s).
        update += owned * (4 + size) / 25e9 + owned * 28 / 20e9
    parts = {"kernels": kernels, "host": host, "exchanges": hidden}
    micro = max(parts.values()) if sharding.overlap else max(kernels, host) + hidden
    total = micro * micro_steps + update
    return StepTime(
        kernels * micro_steps,
        host * micro_steps,
        hidden * micro_steps,
        update,
        total,
        (useful + recomputed) * micro_steps,
        useful * micro_steps,
        useful * micro_steps / total / peak_flops(cluster.gpu, size),
        max(parts, key=lambda name: parts[name]),
    )
