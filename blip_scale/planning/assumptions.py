"""Assumptions of a plan, as numbers and as text."""

from __future__ import annotations

from dataclasses import dataclass

from blip_scale.planning.failures import Costs
from blip_scale.planning.memory import FRAGMENTATION, HEADROOM, RESERVE_BYTES, Load
from blip_scale.planning.timing import (
    COLLECTIVE_LATENCY_S,
    LEVELS,
    LINK_EFFICIENCY,
    Assumed,
    Cluster,
    Execution,
    kernel_flops,
    peak_flops,
)

GIB = 2**30
TOKENS_A_CAPTION = 12.5
"""Mean number of tokens of a web caption, including [CLS] and [SEP]."""
IMAGES_A_CORE = 800.0
"""Number of 500x375 JPEGs that one core decodes and crops per second, measured. For 640x480 it is
560."""


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about data and captions."""

    tokens_each: float = TOKENS_A_CAPTION
    sample_bytes: float | None = None
    images_a_core: float = IMAGES_A_CORE
    unknown_samples: int | None = None
    """Number of images assumed for a stream that is neither local nor published. None refuses such
    streams."""
    pause_s: float | None = None
    """Seconds that training pauses for a checkpoint. None estimates them from its size."""
    restart_s: float | None = None
    """Seconds from the detection of a failure to the next step. None: `failures.RESTART_S`."""
    hang_limit_s: float | None = None
    """Seconds until a hang is detected. None: `failures.HANG_LIMIT_S`."""
    failure_rate: float | None = None
    """Failures per 1,000 node-days. None: a range of published rates."""


def statements(
    cluster: Cluster, load: Load, execution: Execution, assumed: Assumptions, notes: list[str]
) -> tuple[str, ...]:
    """All assumptions of a plan, as text."""
    gpu, sharding = cluster.gpu, load.sharding
    share, start = LINK_EFFICIENCY, COLLECTIVE_LATENCY_S
    overlap = "beside" if sharding.overlap else "after"
    return (
        f"kernels: {_kernels(cluster, execution, sharding.compute_bytes)}",
        f"host: {_host(cluster, execution, load.network.modules)}",
        f"links: {gpu.link_gb_s:g} GB/s in a node, {gpu.network_gbit:g} Gbit/s a node between "
        f"them, {share.expected:.0%} of it reached ({share.slow:.0%} to {share.fast:.0%}), "
        f"{start.expected * 1e6:.0f} us * log2(ranks) to start an exchange "
        f"({start.fast * 1e6:.0f} to {start.slow * 1e6:.0f}); guesses; hidden exchanges run "
        f"{overlap} the computation",
        f"{assumed.tokens_each:g} tokens a caption; {assumed.images_a_core:g} images/s decoded by "
        "a core",
        f"{RESERVE_BYTES / GIB:g} GiB for CUDA and NCCL, {FRAGMENTATION:.0%} lost to "
        f"fragmentation; fused attention kernels; a micro-batch that is proposed leaves "
        f"{HEADROOM:.0%} of the memory free",
        "evaluation, saving and restarts are not in the time, evaluation is not in the goodput",
        *notes,
    )


def failure_statement(costs: Costs) -> str:
    """The assumptions about failures, as text."""
    return (
        f"{costs.pause_s:.1f} s pause for a checkpoint, {costs.write_s:.0f} s until it is "
        f"committed, {costs.restart_s:g} s from a failure to the next step, "
        f"{costs.hang_share:.0%} of the failures are hangs, noticed after {costs.hang_limit_s:g} s"
    )


def _kernels(cluster: Cluster, execution: Execution, compute_bytes: int) -> str:
    peak = peak_flops(cluster.gpu, compute_bytes)
    if cluster.efficiency is not None:
        return f"{cluster.efficiency:.0%} of the peak, as given"
    rate = kernel_flops(cluster, compute_bytes)
    fused = execution.fused if compute_bytes == 2 else Assumed(1.0, 1.0, 1.0)
    shares = [rate.at(level) * fused.at(level) / peak for level in LEVELS]
    fast, expected, slow = (f"{share:.0%}" for share in shares)
    source = "19% measured on one H200 at micro-batch 64, scaled by memory bandwidth"
    if compute_bytes == 4 or cluster.gpu.bf16_tflops is None:
        source = "the published code in fp32 on H200 and A100"
    return f"{expected} of the peak ({slow} to {fast}; {source})"


def _host(cluster: Cluster, execution: Execution, modules: int) -> str:
    if not execution.module_s.expected:
        micro_step = execution.micro_step_s
        return (
            f"{micro_step.expected * 1e3:.0f} ms a micro-step ({micro_step.fast * 1e3:.0f} to "
            f"{micro_step.slow * 1e3:.0f}; {execution.evidence})"
        )
    if cluster.module_call_s is not None:
        return f"{cluster.module_call_s * 1e6:.0f} us for each call of {modules} modules, as given"
    call = execution.module_s
    return (
        f"{call.expected * 1e6:.0f} us ({call.fast * 1e6:.0f} to {call.slow * 1e6:.0f}) for each "
        f"call of {modules} modules, forward and backward; {execution.evidence}"
    )


def duration(seconds: float) -> str:
    """Format a time in days, hours or minutes."""
    if seconds >= 86_400:
        return f"{seconds / 86_400:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
