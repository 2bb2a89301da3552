"""Plan of a recipe on a cluster: memory, time, data, storage, and a verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blip_scale.config.batch_sizes import (
    BatchSizes,
    batch_sizes,
    is_auto,
    possible_micro_batches,
    settled,
)
from blip_scale.config.recipe import Recipe
from blip_scale.config.step_limit import step_limit_s
from blip_scale.model.flops import at_image_size, med_flops
from blip_scale.planning.assumptions import (
    GIB,
    Assumptions,
    duration,
    failure_statement,
    statements,
)
from blip_scale.planning.data_volume import Volume, volume_of
from blip_scale.planning.failures import FAILURE_RATES, Costs, Outlook, costs_of, outlook
from blip_scale.planning.memory import (
    Load,
    Memory,
    largest_micro_batch,
    memory,
    roomy_micro_batch,
)
from blip_scale.planning.network import ContrastOf, Network, network_of
from blip_scale.planning.states import Sharding, checkpoint_bytes, placed
from blip_scale.planning.timing import (
    EXECUTIONS,
    LEVELS,
    Assumed,
    Cluster,
    Exchange,
    Execution,
    StepTime,
    Work,
    exchanges,
    step_time,
)

TIB = 2**40
_WORTH_A_LINE = 0.05
"""Minimum gain for which another micro-batch is proposed, as a share of the time of a step."""


@dataclass(frozen=True)
class Way:
    """One way to execute the steps, with its memory and time."""

    name: str
    execution: Execution
    memory: Memory
    exchanges: tuple[Exchange, ...]
    fast: StepTime
    expected: StepTime
    slow: StepTime

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Seconds of an optimizer step: fast, expected and slow."""
        return self.fast.total_s, self.expected.total_s, self.slow.total_s


@dataclass(frozen=True)
class Larger:
    """A proposed micro-batch, larger and faster than the planned one.

    Of the micro-batches that fit with headroom, it is the smallest that is about as fast as the
    fastest.
    """

    micro_batch: int
    step_s: float
    """Expected seconds of a step."""
    gain: float
    """Seconds of a step with the planned micro-batch, divided by `step_s`."""


@dataclass(frozen=True)
class Plan:
    """Needs of a run: memory of the rank that needs most, and times of every rank."""

    sizes: BatchSizes
    stage: int
    offload: bool
    ways: tuple[Way, ...]
    """All ways that the settings allow. Other fields refer to the first one."""
    limit_bytes: float
    largest_micro_batch: int
    """Largest micro-batch that fits without headroom. It may not divide the global batch."""
    max_micro_batch: int
    """Largest micro-batch that fits with headroom and divides the global batch; 0 if none does."""
    larger: Larger | None
    negatives: str
    """Value of `objective.itm`: source of ITM's hard negatives, or none."""
    steps: int
    volume: Volume
    checkpoint_bytes: float
    kept_checkpoints: int
    cores_a_gpu: float
    failures: Outlook
    network: Network
    cluster: Cluster
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def way(self) -> Way:
        """Way to which the other properties refer."""
        return self.ways[0]

    @property
    def memory(self) -> Memory:
        """Memory of a GPU."""
        return self.way.memory

    @property
    def step(self) -> StepTime:
        """Expected time of a step."""
        return self.way.expected

    @property
    def fits(self) -> bool:
        """Whether the run fits into the memory of a GPU with this micro-batch."""
        return self.memory.total <= self.limit_bytes

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without evaluations, saves and restarts."""
        return self.steps * self.step.total_s

    @property
    def samples_per_s(self) -> float:
        """Pairs per second of all ranks together."""
        return self.sizes.global_batch / self.step.total_s

    @property
    def verdict(self) -> str:
        """One line: whether the run fits, and how long it takes or what to change."""
        if not self.fits:
            return self.memory_verdict
        fast, _, slow = (self.steps * seconds for seconds in self.way.seconds)
        return (
            f"{self.memory_verdict}; {duration(self.seconds)} ({duration(fast)} to "
            f"{duration(slow)}) on {self.cluster.ranks} GPUs, limited by {self.step.limit}"
        )

    @property
    def advice(self) -> str | None:
        """One line that proposes a larger micro-batch; None if none is faster."""
        if self.larger is None:
            return None
        pool = ""
        if self.negatives == "local":
            pool = (
                f"; local ITM negatives then come from {self.larger.micro_batch} pairs, not "
                f"{self.sizes.micro_batch}, which changes the training"
            )
        return (
            f"train.max_micro_batch_size={self.larger.micro_batch} takes "
            f"{self.larger.step_s * 1e3:.0f} ms a step, {self.larger.gain:.1f} times as fast "
            f"(auto takes {self.max_micro_batch}){pool}"
        )

    @property
    def memory_verdict(self) -> str:
        """Part of the verdict about memory."""
        used, there = self.memory.total / GIB, self.limit_bytes / GIB
        micro, best = self.sizes.micro_batch, self.max_micro_batch
        if self.fits:
            room = "" if best == micro else f", {best} would fit as well"
            return f"fits: {used:.1f} of {there:.1f} GiB a GPU with a micro-batch of {micro}{room}"
        if best:
            fix = f"give train.micro_batch_size={best}"
        elif not self.network.config.gradient_checkpointing:
            fix = "give model.gradient_checkpointing=true"
        elif not self.offload:
            fix = "give --offload (ds_configs/zero3_offload.json)"
        else:
            fix = "take GPUs with more memory"
        return (
            f"does not fit: {used:.1f} of {there:.1f} GiB a GPU with a micro-batch of {micro}; "
            f"{fix}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object, with units in the names."""
        step = {k: v for k, v in dataclasses.asdict(self.step).items() if k != "total_s"}
        fast, expected, slow = self.way.seconds
        return {
            "memory_per_gpu_gib": self.memory.total / GIB,
            "memory_limit_gib": self.limit_bytes / GIB,
            "fits": self.fits,
            "max_micro_batch_size": self.max_micro_batch,
            "step_seconds": expected,
            "step_seconds_range": [fast, slow],
            "way": self.way.name,
            "ways": {way.name: _way_json(way, self.sizes.global_batch) for way in self.ways},
            "larger_micro_batch": dataclasses.asdict(self.larger) if self.larger else None,
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
            "failures": _failures_json(self.failures),
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
        """Bytes of all retained checkpoints and of one that is being written."""
        return self.checkpoint_bytes * (self.kept_checkpoints + 1)

    @property
    def data_mb_s(self) -> float:
        """Megabytes per second that each node reads."""
        return self.samples_per_s / self.cluster.nodes * self.volume.sample_bytes / 1e6


def make_plan(
    recipe: Recipe,
    zero: Mapping[str, Any],
    cluster: Cluster,
    contrast_of: ContrastOf,
    assumed: Assumptions | None = None,
    way: str | None = None,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: the recipe.
        zero: DeepSpeed's settings; only `zero_optimization` is read.
        cluster: the machines.
        contrast_of: creates the recipe's contrast.
        assumed: assumptions about data and captions. None: the defaults.
        way: a key of EXECUTIONS. None: eager, with weights placed like in a run.

    Raises:
        ValueError: the batch can't be divided among the GPUs, the settings do not allow `way`, or
            sizes are unknown.
        FileNotFoundError: a text checkpoint doesn't exist.
    """
    assumed = assumed or Assumptions()
    ranks = cluster.ranks
    _sizes(recipe, cluster)  # fails for impossible batches before the network is built
    size = 2 if recipe.train.precision == "bf16" else 4
    network = network_of(recipe, contrast_of)
    base = Sharding.of(zero, ranks, size)
    limit = cluster.gpu.memory_gib * GIB
    kept = placed(base, recipe, zero["zero_optimization"], network, limit)
    names = _ways(base, way or ("whole" if kept.whole else None))
    each = min(assumed.tokens_each, recipe.model.text.max_tokens)
    loads = {name: Load.of(recipe, network, _sharding(base, name), each) for name in names}
    load = loads[names[0]]
    possible = possible_micro_batches(recipe, ranks)
    # A run resolves `auto` for captions of maximum length.
    longest = dataclasses.replace(load, tokens_each=recipe.model.text.max_tokens)
    roomy = roomy_micro_batch(longest, possible, limit)
    if is_auto(recipe):
        recipe = settled(recipe, roomy or possible[0])
    sizes = _sizes(recipe, cluster)

    def time(name: str, batch: int) -> Way:
        split = BatchSizes(sizes.global_batch, batch, sizes.global_batch // batch // ranks, ranks)
        work = Work(network, loads[name].sharding, split, loads[name].tokens(batch))
        execution = EXECUTIONS[name]
        times = {level: step_time(work, cluster, execution, level) for level in LEVELS}
        held = memory(loads[name], batch)
        return Way(name, execution, held, exchanges(work, cluster), **times)

    ways = tuple(time(name, sizes.micro_batch) for name in names)
    step = ways[0].expected
    larger = _larger(
        {n: time(names[0], n).expected.total_s for n in possible if n <= roomy}, sizes.micro_batch,
        step.total_s,
    )  # fmt: skip
    volume = volume_of(recipe, assumed.sample_bytes, assumed.unknown_samples)
    steps = recipe.train.epochs * (volume.samples_per_epoch // sizes.global_batch)
    if recipe.train.max_steps is not None:
        steps = min(steps, recipe.train.max_steps)
    costs = _costs(recipe, step.total_s, checkpoint_bytes(network), cluster, assumed)
    rates = FAILURE_RATES if assumed.failure_rate is None else Assumed(*[assumed.failure_rate] * 3)
    notes = [failure_statement(costs), *network.notes, *volume.notes]
    return Plan(
        sizes, base.stage, base.offload, ways, limit, largest_micro_batch(load, limit), roomy,
        larger, recipe.objective.itm, steps, volume, checkpoint_bytes(network),
        _kept(recipe, steps), sizes.global_batch / step.total_s / ranks / assumed.images_a_core,
        outlook(cluster.nodes, step.total_s, recipe.checkpoint.every_steps, costs, rates),
        network, cluster, statements(cluster, load, EXECUTIONS[names[0]], assumed, notes),
        (
            *_warnings(recipe, base, cluster),
            *_size_warnings(recipe, network, sizes.micro_batch, load.tokens(sizes.micro_batch)),
        ),
    )  # fmt: skip


def _costs(
    recipe: Recipe, step_s: float, checkpoint: float, cluster: Cluster, assumed: Assumptions
) -> Costs:
    """Costs of checkpoints and failures. Values set by the user replace the estimates."""
    limits = recipe.hang_limits
    others_s = (limits.start_s, limits.evaluation_s, limits.save_s)
    longest_s = max(limit_s or math.inf for limit_s in others_s)
    costs = dataclasses.replace(
        costs_of(checkpoint, cluster.ranks, cluster.nodes),
        hang_limit_s=step_limit_s(limits, step_s, longest_s),
    )
    values = {
        "pause_s": assumed.pause_s,
        "restart_s": assumed.restart_s,
        "hang_limit_s": assumed.hang_limit_s,
    }
    overrides = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(costs, **overrides)


def _failures_json(failures: Outlook) -> dict[str, Any]:
    def span(values: Assumed) -> list[float]:
        return [values.slow, values.fast]

    return {
        "a_week": failures.failures_a_week.expected,
        "a_week_range": span(failures.failures_a_week),
        "best_every_steps": failures.best_every_steps,
        "best_goodput": failures.best_goodput.expected,
        "best_goodput_range": span(failures.best_goodput),
        "every_steps": failures.every_steps,
        "goodput": failures.goodput.expected,
        "goodput_range": span(failures.goodput),
        "costs_s": dataclasses.asdict(failures.costs),
    }


def _larger(seconds: dict[int, float], planned: int, planned_s: float) -> Larger | None:
    """Choose a larger micro-batch from the seconds of those that fit; None if none is faster."""
    best = min(seconds.values(), default=planned_s)
    fast = [n for n in seconds if n > planned and seconds[n] <= (1 + _WORTH_A_LINE) * best]
    if not fast or seconds[min(fast)] > (1 - _WORTH_A_LINE) * planned_s:
        return None
    chosen = min(fast)
    return Larger(chosen, seconds[chosen], planned_s / seconds[chosen])


def _ways(sharding: Sharding, chosen: str | None) -> list[str]:
    """Names of the ways that DeepSpeed's settings allow, with the chosen one first."""
    names = ["partitioned", "whole", "graph"] if sharding.partitions else ["whole", "graph"]
    if chosen is None:
        return names
    if chosen not in names:
        raise ValueError(
            f"--way {chosen}: weights are whole under ZeRO-{sharding.stage} on {sharding.ranks} "
            f"rank{'s' * (sharding.ranks > 1)}; give {' or '.join(names)}"
        )
    return [chosen, *(name for name in names if name != chosen)]


def _sharding(base: Sharding, name: str) -> Sharding:
    """Sharding for one way of execution."""
    if base.stage == 3 and EXECUTIONS[name].whole:
        return dataclasses.replace(base, whole=True)
    return base


def _way_json(way: Way, global_batch: int) -> dict[str, Any]:
    fast, expected, slow = way.seconds
    return {
        "name": way.execution.name,
        "evidence": way.execution.evidence,
        "memory_gib": way.memory.total / GIB,
        "step_seconds": expected,
        "step_seconds_range": [fast, slow],
        "samples_per_s": global_batch / expected,
        "samples_per_s_range": [global_batch / slow, global_batch / fast],
        "limit": way.expected.limit,
        "exchanges": [dataclasses.asdict(exchange) for exchange in way.exchanges],
    }


def _warnings(recipe: Recipe, sharding: Sharding, cluster: Cluster) -> tuple[str, ...]:
    warnings = []
    if recipe.train.precision == "bf16" and cluster.gpu.bf16_tflops is None:
        warnings.append("this GPU has no bf16 matrix units: give train.precision=fp32 or others")
    if sharding.stage == 1:
        warnings.append("train.py takes ZeRO 2 or 3: ZeRO-1 is shown for comparison")
    if recipe.task != "pretrain":
        warnings.append(
            f"memory and time are those of pretraining with this network and batch; {recipe.task} "
            "is not modelled"
        )
    return tuple(warnings)


def _size_warnings(recipe: Recipe, network: Network, batch: int, tokens: int) -> tuple[str, ...]:
    """For a run with smaller early images, state its FLOPs as a share of the plan's."""
    if not recipe.data.image_sizes:
        return ()
    losses, size = (network.decodes, network.matches), recipe.model.vision.image_size

    def flops(image_size: int) -> float:
        config = at_image_size(network.config, image_size)
        med = med_flops(config, batch, tokens, *losses)
        return med + network.contrast.flops(config, batch, tokens)

    epochs, begin, total = float(recipe.train.epochs), 0.0, 0.0
    for stage in recipe.data.image_sizes:
        end = min(stage.until_epoch, epochs)
        total += (end - begin) * flops(stage.size)
        begin = end
    share = (total + (epochs - begin) * flops(size)) / (epochs * flops(size))
    return (
        f"data.image_sizes: memory and time are those of {size} pixels; the whole run takes "
        f"{share:.0%} of these FLOPs",
    )


def _sizes(recipe: Recipe, cluster: Cluster) -> BatchSizes:
    """Compute the batch sizes. The error message also names numbers of nodes that would work."""
    try:
        return batch_sizes(recipe, cluster.ranks)
    except ValueError as error:
        unit = cluster.gpus_per_node * (recipe.train.micro_batch_size or 1)
        batch = recipe.train.global_batch_size
        max_nodes = min(2 * cluster.nodes, batch // unit)  # more ranks than pairs never divide
        nodes = [n for n in range(1, max_nodes + 1) if batch % (n * unit) == 0]
        near = sorted(sorted(nodes, key=lambda n: abs(n - cluster.nodes))[:3])
        others = f"; or --nodes {' or '.join(map(str, near))}" if near else ""
        raise ValueError(f"{error}{others}") from error


def _kept(recipe: Recipe, steps: int) -> int:
    """Number of checkpoints retained at the end."""
    keep_every = recipe.checkpoint.keep_every
    return recipe.checkpoint.keep_last + (steps // keep_every if keep_every else 0)
