"""Seconds of an optimizer step: kernels, host, exchanges and update, from stated assumptions.

A micro-step takes as long as the slowest of kernels, host and the exchanges that hide behind both;
what nothing hides comes on top. Each assumption has a slow, an expected and a fast value, so a plan
gives a range. The figures come from one H200 (docs/performance.md, "On a GPU"; 2026-11-29, bf16,
micro-batch 64, before the engine's detours were removed):

    plain PyTorch               0.198 s a step
    ZeRO-3 on one rank          0.405 s a step
    kernels alone (profiler)    0.067 s a step: 189 TFLOP/s, 19 % of the 989 of the card

A step calls 393 modules that have weights, forward and backward, so the host took 250 us a call in
plain PyTorch and 515 us under ZeRO-3.
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
"""Largest number of gradient reductions of a backward pass where weights stay whole."""

Level = Literal["slow", "expected", "fast"]
LEVELS: tuple[Level, ...] = ("fast", "expected", "slow")


@dataclass(frozen=True)
class Assumed:
    """A quantity with the bounds of what is believed of it."""

    slow: float
    expected: float
    fast: float

    def at(self, level: Level) -> float:
        """The value at a level."""
        return float(getattr(self, level))


@dataclass(frozen=True)
class Execution:
    """A way to run the passes of a step."""

    name: str
    whole: bool
    """Whether each rank holds all weights through the passes."""
    module_s: Assumed
    """Host seconds to call a module with weights of its own, once a pass: Python, hooks, kernel
    launches."""
    micro_step_s: Assumed
    """Host seconds of a micro-step besides."""
    fused: Assumed
    """Speed of the bf16 kernels, relative to eager ones; in fp32 products take the time."""
    evidence: str


_NOTHING = Assumed(0.0, 0.0, 0.0)
_EAGER = Assumed(1.0, 1.0, 1.0)

EXECUTIONS = {
    # Fast: plain PyTorch, measured. Expected and slow: 0.25 and 0.30 s a step on one rank, the
    # estimate for the engine without its detours (0.22 to 0.30 s).
    "whole": Execution(
        "eager, weights whole", True, Assumed(380e-6, 320e-6, 250e-6), _NOTHING, _EAGER,
        "estimated between plain PyTorch and ZeRO-3 as measured",
    ),
    # Slow: DeepSpeed's hooks around each weight, measured under ZeRO-3 on one rank. Fast: as above.
    "partitioned": Execution(
        "eager, weights partitioned", False, Assumed(515e-6, 415e-6, 320e-6), _NOTHING, _EAGER,
        "slow value measured on one rank, never run on several GPUs",
    ),
    # A replayed graph costs the host next to nothing: loader, metrics and optimizer remain. Fused
    # kernels: 30 % of the peak is the most that a ViT-B/16 reaches in the field (JAX, A100), and
    # eager ones were measured at 19 %.
    "graph": Execution(
        "CUDA graph, weights whole", True, _NOTHING, Assumed(20e-3, 10e-3, 2e-3),
        Assumed(1.0, 1.0, 1.6), "estimated from the kernels alone",
    ),
}  # fmt: skip
"""Name of `--way` -> how the step is run."""

LINK_EFFICIENCY = Assumed(0.5, 0.7, 0.85)
"""Share of a link's bandwidth that collectives reach. A guess."""
COLLECTIVE_LATENCY_S = Assumed(50e-6, 25e-6, 10e-6)
"""Start of an exchange between two nodes; a ring or tree takes it log2(ranks) times. A guess."""
BF16_EFFICIENCY = 0.19
"""Share of the peak that the eager kernels of a step reached on the H200."""
_ONE_MEASUREMENT = 0.25
"""How far kernel speed may be off either way: one card and one micro-batch were measured."""
FP32_EFFICIENCY = Assumed(0.40, 0.45, 0.50)
"""Share of the fp32 peak: the published code's step on the H200 (43 % at micro-batch 32), and its
author's 30 pairs/s an A100 (47 %)."""


@dataclass(frozen=True)
class Cluster:
    """Machines and what they are assumed to reach."""

    nodes: int
    gpus_per_node: int
    gpu: GPU
    efficiency: float | None = None
    """Share of the peak of matrix products that the kernels reach; None: as measured."""
    module_call_s: float | None = None
    """Host seconds of a call of a module, in eager execution; None: as measured."""

    @property
    def ranks(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    def exchange_s(self, data_bytes: float, collectives: float, level: Level) -> float:
        """Seconds in which every rank has gathered, or reduced and scattered, so many bytes.

        A ring over all ranks crosses a node's network once; all its cards carry a part.
        """
        if self.ranks == 1:
            return 0.0
        link = self.gpu.link_gb_s if self.gpus_per_node > 1 else math.inf
        network = self.gpu.network_gbit / 8 if self.nodes > 1 else math.inf
        bandwidth = min(link, network) * 1e9 * LINK_EFFICIENCY.at(level)
        latency = COLLECTIVE_LATENCY_S.at(level) * math.log2(self.ranks) * collectives
        return data_bytes * (self.ranks - 1) / self.ranks / bandwidth + latency


def peak_flops(gpu: GPU, compute_bytes: int) -> float:
    """Peak of matrix products of a type, in FLOP/s; a GPU without bf16 units computes it as
    fp32."""
    peak = gpu.bf16_tflops if compute_bytes == 2 else None
    return (peak or gpu.fp32_tflops) * 1e12


def kernel_flops(cluster: Cluster, compute_bytes: int) -> Assumed:
    """FLOP/s that the eager kernels of a step reach.

    In bf16 they wait for memory more than for the matrix units: the share of the peak that ViT-B/16
    reaches in the field goes with memory bandwidth (A100 29 %, H100 16 %). So the H200's figure is
    scaled by bandwidth; scaling it by the peak gives another bound.
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
    """A step to be timed."""

    network: Network
    sharding: Sharding
    sizes: BatchSizes
    tokens: int
    """Of the captions of a micro-batch together."""


@dataclass(frozen=True)
class Exchange:
    """Exchanges of one kind in an optimizer step of a rank."""

    name: str
    calls: int
    data_bytes: float
    """Of the whole tensors that are gathered or reduced."""
    seconds: float
    hidden: bool
    """Whether they run beside the computation, where DeepSpeed's settings overlap them."""


def exchanges(work: Work, cluster: Cluster, level: Level = "expected") -> tuple[Exchange, ...]:
    """What ranks exchange in an optimizer step; nothing on one rank.

    Whole weights are gathered in one exchange after the update, the momentum copies in another, and
    gradients are reduced in buckets, under ZeRO-3 once a step. Partitioned weights are gathered
    once a micro-step, an exchange for each module whose weights are above the threshold;
    prefetching merges some.
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
        parted = sum(numel > sharding.persistent for numel in network.module_parameters)
        elements = (trained + still + copied) * micro_steps
        listed.insert(0, exchange("gathers", parted * micro_steps, elements, hidden=True))
    else:
        moved = max(copied - still, 0)
        calls = 2 if moved else 1
        listed.insert(0, exchange("gathers", calls, trained + moved, hidden=False))
    if network.contrast_bytes:
        # Keys of both modalities, fp32, of all ranks.
        features = 2 * 4 * network.config.embed_dim * sizes.global_batch / size
        listed.append(exchange("features", 2 * micro_steps, features, hidden=False))
    return tuple(listed)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every rank."""

    kernels_s: float
    host_s: float
    exchanges_s: float
    """Of weights and gradients, hidden behind kernels and host where ZeRO overlaps them."""
    update_s: float
    """Optimizer, momentum copies, and the exchanges that nothing hides."""
    total_s: float
    flops: float
    """Of one rank, recomputation included."""
    useful_flops: float
    """Without it."""
    mfu: float
    """Share of the peak of matrix products that `useful_flops` take of the whole step."""
    limit: str
    """What takes the time: kernels, host or exchanges."""


def step_time(
    work: Work, cluster: Cluster, execution: Execution, level: Level = "expected"
) -> StepTime:
    """Seconds of an optimizer step, with all assumptions at one level."""
    network, sharding, sizes = work.network, work.sharding, work.sizes
    size, micro_steps = sharding.compute_bytes, sizes.accumulation
    useful = med_flops(network.config, sizes.micro_batch, work.tokens)
    useful += network.contrast.flops(sizes.micro_batch, work.tokens)
    recomputed, passes = 0.0, 2
    if network.config.gradient_checkpointing:
        recomputed = recomputation_flops(network.config, sizes.micro_batch, work.tokens)
        passes = 3
    fused = execution.fused.at(level) if size == 2 else 1.0
    kernels = (useful + recomputed) / (kernel_flops(cluster, size).at(level) * fused)
    call = execution.module_s.at(level)
    if call and cluster.module_call_s is not None:
        call = cluster.module_call_s
    host = network.modules * passes * call + execution.micro_step_s.at(level)
    listed = exchanges(work, cluster, level)
    hidden = sum(item.seconds for item in listed if item.hidden) / micro_steps
    own = sum(network.trainable) / sizes.world_size
    update = own * (9 * 4 + 3 * 4) / (cluster.gpu.memory_gb_s * 1e9)  # moments, masters, averages
    update += sum(item.seconds for item in listed if not item.hidden)
    if sharding.offload:
        # Gradients go to the host and weights come back over PCIe, AdamW runs on its cores.
        update += own * (4 + size) / 25e9 + own * 28 / 20e9
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
