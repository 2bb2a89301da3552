"""Seconds of an optimizer step: arithmetic, memory, host and network, from stated assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blip_scale.config.checks import BatchSizes
from blip_scale.model.flops import pretraining_flops, recomputation_flops
from blip_scale.planning.hardware import GPU
from blip_scale.planning.network import Network
from blip_scale.planning.states import Sharding

COLLECTIVE_LATENCY_S = 25e-6
"""Start of an exchange between two nodes; a ring or tree takes it log2(ranks) times."""


@dataclass(frozen=True)
class Cluster:
    """Machines and what they are assumed to reach."""

    nodes: int
    gpus_per_node: int
    gpu: GPU
    efficiency: float = 0.4
    """Share of the peak of matrix products that a whole step reaches while the GPU computes."""
    link_efficiency: float = 0.7
    """Share of a link's bandwidth that collectives reach."""
    module_call_s: float = 60e-6
    """Python, ZeRO's hooks and kernel launches of one module, forward or backward: the host cannot
    prepare a micro-step faster, however small it is."""

    @property
    def ranks(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    def exchange_s(self, data_bytes: float, collectives: float = 1) -> float:
        """Seconds in which every rank has gathered, or reduced and scattered, so many bytes.

        A ring over all ranks crosses a node's network once; all its cards carry a part.
        """
        if self.ranks == 1:
            return 0.0
        link = self.gpu.link_gb_s if self.gpus_per_node > 1 else math.inf
        network = self.gpu.network_gbit / 8 if self.nodes > 1 else math.inf
        bandwidth = min(link, network) * 1e9 * self.link_efficiency
        latency = COLLECTIVE_LATENCY_S * math.log2(self.ranks) * collectives
        return data_bytes * (self.ranks - 1) / self.ranks / bandwidth + latency


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every rank."""

    compute_s: float
    host_s: float
    communication_s: float
    """Of weights and gradients, hidden behind the computation where ZeRO overlaps them."""
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
    """What takes the time: compute, host or communication."""


def step_time(
    network: Network, sharding: Sharding, sizes: BatchSizes, cluster: Cluster, text: tuple[int, int]
) -> StepTime:
    """Seconds of an optimizer step.

    Args:
        text: tokens of a micro-batch's captions together, and columns of the queue.
    """
    tokens, queue = text
    size, micro_steps = sharding.compute_bytes, sizes.accumulation
    peak = cluster.gpu.bf16_tflops if size == 2 else cluster.gpu.fp32_tflops
    assert peak is not None
    useful = pretraining_flops(network.config, sizes.micro_batch, tokens, queue)
    recomputed, passes = 0.0, 2  # the momentum copies have a forward pass alone
    if network.config.gradient_checkpointing:
        recomputed = recomputation_flops(network.config, sizes.micro_batch, tokens)
        passes = 3
    compute = (useful + recomputed) / (peak * 1e12 * cluster.efficiency)
    host = network.modules * passes * cluster.module_call_s
    trained, copied = sum(network.trainable), sum(network.momentum)
    still = sum(network.frozen)
    reduce = cluster.exchange_s(size * trained, trained / sharding.reduce_bucket + 1)
    if sharding.stage == 3:
        reduce += cluster.exchange_s(size * (trained + still + copied), network.modules / 2)
    features = 2 * 2 * 4 * network.config.embed_dim * sizes.micro_batch * sizes.world_size
    own = trained / sizes.world_size
    update = own * (9 * 4 + 3 * 4) / (cluster.gpu.memory_gb_s * 1e9)  # moments, masters, averages
    update += cluster.exchange_s(features, 4) * micro_steps
    if sharding.stage != 3:
        update += cluster.exchange_s(size * trained)
        update += 2 * cluster.exchange_s(size * (copied - still))
    if sharding.stage == 1:
        reduce /= micro_steps  # once a step
    if sharding.offload:
        # Gradients go to the host and weights come back over PCIe, AdamW runs on its cores.
        update += own * (4 + size) / 25e9 + own * 28 / 20e9
    parts = {"compute": compute, "host": host, "communication": reduce}
    micro = max(parts.values()) if sharding.overlap else max(compute, host) + reduce
    total = micro * micro_steps + update
    return StepTime(
        compute * micro_steps,
        host * micro_steps,
        reduce * micro_steps,
        update,
        total,
        (useful + recomputed) * micro_steps,
        useful * micro_steps,
        useful * micro_steps / total / (peak * 1e12),
        max(parts, key=lambda name: parts[name]),
    )
