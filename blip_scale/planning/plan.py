"""A recipe on a cluster: memory, time, data and storage put together, and a verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blip_scale.config import checks
from blip_scale.config.recipe import Recipe
from blip_scale.planning.data_volume import Volume, volume_of
from blip_scale.planning.memory import (
    FRAGMENTATION,
    RESERVE_BYTES,
    Memory,
    largest_micro_batch,
    memory,
)
from blip_scale.planning.network import Network, network_of
from blip_scale.planning.states import Sharding, checkpoint_bytes
from blip_scale.planning.timing import COLLECTIVE_LATENCY_S, Cluster, StepTime, step_time

GIB = 2**30
TIB = 2**40
TOKENS_A_CAPTION = 12.5
"""Mean of web captions, [CLS] and [SEP] included."""
IMAGES_A_CORE = 800.0
"""Decoded and cropped a second by one core, measured with JPEGs of 500x375 (560 at 640x480)."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted of data and captions."""

    tokens_each: float = TOKENS_A_CAPTION
    sample_bytes: float | None = None
    images_a_core: float = IMAGES_A_CORE
    unknown_samples: int | None = None
    """Of a stream that is neither here nor published; None refuses it."""


@dataclass(frozen=True)
class Plan:
    """What a run will need. Memory of the rank that holds most, times of every rank."""

    sizes: checks.BatchSizes
    stage: int
    offload: bool
    memory: Memory
    limit_bytes: float
    largest_micro_batch: int
    """Of any size."""
    max_micro_batch: int
    """The largest that fits and divides global batch by ranks; 0 when none does."""
    step: StepTime
    steps: int
    volume: Volume
    checkpoint_bytes: float
    kept_checkpoints: int
    cores_a_gpu: float
    network: Network
    cluster: Cluster
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a GPU holds the run with this micro-batch."""
        return self.memory.total <= self.limit_bytes

    @property
    def seconds(self) -> float:
        """Of all steps, without evaluations, saves and restarts."""
        return self.steps * self.step.total_s

    @property
    def samples_per_s(self) -> float:
        """Pairs of all ranks together."""
        return self.sizes.global_batch / self.step.total_s

    @property
    def verdict(self) -> str:
        """One line: whether it fits, how long it takes, and what to change where it does not."""
        if not self.fits:
            return self.memory_verdict
        return (
            f"{self.memory_verdict}; {_duration(self.seconds)} on {self.cluster.ranks} GPUs, "
            f"{self.step.limit} takes the time"
        )

    @property
    def memory_verdict(self) -> str:
        """The verdict without the time."""
        used, there = self.memory.total / GIB, self.limit_bytes / GIB
        micro, best = self.sizes.micro_batch, self.max_micro_batch
        if self.fits:
            room = "" if best == micro else f", {best} would fit as well"
            return f"fits: {used:.1f} of {there:.1f} GiB a GPU with a micro-batch of {micro}{room}"
        if best:
            mend = f"give train.micro_batch_size={best}"
        elif not self.network.config.gradient_checkpointing:
            mend = "give model.gradient_checkpointing=true"
        elif not self.offload:
            mend = "give --offload (ds_configs/zero3_offload.json)"
        else:
            mend = "take GPUs with more memory"
        return (
            f"does not fit: {used:.1f} of {there:.1f} GiB a GPU with a micro-batch of {micro}; "
            f"{mend}"
        )

    def to_json(self) -> dict[str, Any]:
        """One object of numbers; the units stand in the names."""
        step = {k: v for k, v in dataclasses.asdict(self.step).items() if k != "total_s"}
        return {
            "memory_per_gpu_gib": self.memory.total / GIB,
            "memory_limit_gib": self.limit_bytes / GIB,
            "fits": self.fits,
            "max_micro_batch_size": self.max_micro_batch,
            "step_seconds": self.step.total_s,
            "days": self.seconds / 86_400,
            "gpu_hours": self.seconds / 3600 * self.cluster.ranks,
            "storage_tib": (self.volume.stored_bytes + self.checkpoints_bytes) / TIB,
            "verdict": self.verdict,
            "zero_stage": self.stage,
            "offload": self.offload,
            "batch": dataclasses.asdict(self.sizes),
            "largest_micro_batch_size": self.largest_micro_batch,
            "memory_terms_gib": {k: v / GIB for k, v in self.memory.terms.items()},
            "host_memory_per_node_gib": self.memory.host * self.cluster.gpus_per_node / GIB,
            "step": step,
            "steps": self.steps,
            "samples_per_s": self.samples_per_s,
            "data": {
                "images": self.volume.samples,
                "samples_per_epoch": self.volume.samples_per_epoch,
                "images_per_s_per_node": self.samples_per_s / self.cluster.nodes,
                "mb_per_s_per_node": self.data_mb_s,
                "cpu_cores_per_gpu": self.cores_a_gpu,
                "shards_tib": self.volume.stored_bytes / TIB,
                "checkpoint_gib": self.checkpoint_bytes / GIB,
                "checkpoints_kept": self.kept_checkpoints,
            },
            "parameters": {
                "trainable": sum(self.network.trainable),
                "frozen": sum(self.network.frozen),
                "momentum": sum(self.network.momentum),
            },
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
        }

    @property
    def checkpoints_bytes(self) -> float:
        """All that are kept, and one that is being written."""
        return self.checkpoint_bytes * (self.kept_checkpoints + 1)

    @property
    def data_mb_s(self) -> float:
        """Megabytes a second that each node reads."""
        return self.samples_per_s / self.cluster.nodes * self.volume.sample_bytes / 1e6


def make_plan(
    recipe: Recipe,
    zero: Mapping[str, Any],
    cluster: Cluster,
    assumed: Assumptions = Assumptions(),
) -> Plan:
    """Plan a recipe.

    Args:
        zero: DeepSpeed's settings; of them `zero_optimization` counts.
        cluster: the machines.

    Raises:
        ValueError: a batch that does not divide over the GPUs, sizes that are not known.
        FileNotFoundError: a text checkpoint that is not there.
    """
    sizes = _sizes(recipe, cluster)
    warnings = []
    size = 2 if recipe.train.precision == "bf16" else 4
    if size == 2 and cluster.gpu.bf16_tflops is None:
        warnings.append("this GPU has no bf16 matrix units: give train.precision=fp32 or others")
        cluster = dataclasses.replace(
            cluster, gpu=dataclasses.replace(cluster.gpu, bf16_tflops=cluster.gpu.fp32_tflops)
        )
    network = network_of(recipe)
    sharding = Sharding.of(zero, cluster.ranks, size)
    queue = recipe.objective.queue_size
    limit = cluster.gpu.memory_gib * GIB
    each = min(assumed.tokens_each, recipe.model.text.max_tokens)
    held = memory(network, sharding, sizes.micro_batch, queue, each)
    largest = largest_micro_batch(network, sharding, queue, each, limit)
    share = sizes.global_batch // sizes.world_size
    least = 2 if recipe.objective.negatives == "local" else 1
    fitting = [n for n in range(least, min(share, largest) + 1) if share % n == 0]
    tokens = math.ceil(sizes.micro_batch * each)
    step = step_time(network, sharding, sizes, cluster, (tokens, queue))
    volume = volume_of(recipe, assumed.sample_bytes, assumed.unknown_samples)
    steps = recipe.train.epochs * (volume.samples_per_epoch // sizes.global_batch)
    if recipe.train.max_steps is not None:
        steps = min(steps, recipe.train.max_steps)
    if sharding.stage == 1:
        warnings.append("train.py takes ZeRO 2 or 3: ZeRO-1 is shown for comparison")
    return Plan(
        sizes, sharding.stage, sharding.offload, held, limit, largest, max(fitting, default=0),
        step, steps, volume, checkpoint_bytes(network, queue), _kept(recipe, steps),
        sizes.global_batch / step.total_s / cluster.ranks / assumed.images_a_core,
        network, cluster, _assumptions(cluster, sharding, assumed, [*network.notes, *volume.notes]),
        tuple(warnings),
    )  # fmt: skip


def _sizes(recipe: Recipe, cluster: Cluster) -> checks.BatchSizes:
    """Batch arithmetic; a refusal also names numbers of nodes that would do."""
    try:
        return checks.batch_sizes(recipe, cluster.ranks)
    except ValueError as error:
        unit = cluster.gpus_per_node * (recipe.train.micro_batch_size or 1)
        batch = recipe.train.global_batch_size
        nodes = [n for n in range(1, 2 * cluster.nodes + 1) if batch % (n * unit) == 0]
        near = sorted(sorted(nodes, key=lambda n: abs(n - cluster.nodes))[:3])
        others = f"; or --nodes {' or '.join(map(str, near))}" if near else ""
        raise ValueError(f"{error}{others}") from error


def _kept(recipe: Recipe, steps: int) -> int:
    """Checkpoints that lie on the disk at the end."""
    for_ever = recipe.checkpoint.keep_every
    return recipe.checkpoint.keep_last + (steps // for_ever if for_ever else 0)


def _assumptions(
    cluster: Cluster, sharding: Sharding, assumed: Assumptions, notes: list[str]
) -> tuple[str, ...]:
    gpu = cluster.gpu
    overlap = "overlapped with" if sharding.overlap else "not overlapped with"
    return (
        f"matrix products reach {cluster.efficiency:.0%} of the peak; the host needs "
        f"{cluster.module_call_s * 1e6:.0f} us for each call of a module",
        f"links {gpu.link_gb_s:g} GB/s in a node, {gpu.network_gbit:g} Gbit/s a node between them, "
        f"{cluster.link_efficiency:.0%} of it reached, {COLLECTIVE_LATENCY_S * 1e6:.0f} us * "
        f"log2(ranks) to start an exchange; weights and gradients are {overlap} the computation",
        f"{assumed.tokens_each:g} tokens a caption; {assumed.images_a_core:g} images/s decoded by "
        "a core",
        f"{RESERVE_BYTES / GIB:g} GiB for CUDA and NCCL, {FRAGMENTATION:.0%} lost to "
        "fragmentation; fused attention kernels",
        "evaluation, saving and restarts are not in the time",
        *notes,
    )


def _duration(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:.1f} days" if days >= 1 else f"{seconds / 3600:.1f} hours"
