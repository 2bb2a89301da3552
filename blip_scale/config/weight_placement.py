"""Where the weights of a ZeRO-3 run lie: whole on every rank, or partitioned over the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
SHARE_FOR_STATES = 0.5
"""Part of a device's memory that weights, gradients and optimizer may take where weights stay
whole; the rest is for activations."""
_FP32 = 4
_PERSISTENCE = "stage3_param_persistence_threshold"


@dataclass(frozen=True)
class Sizes:
    """What the memory of weights, gradients and optimizer depends on."""

    trainable: int
    """Elements of all trainable parameters."""
    other: int
    """Elements of momentum copies and frozen parameters."""
    ranks: int
    accumulation: int
    """Micro-steps in an optimizer step."""
    compute_bytes: int
    """Bytes of an element of the weights that compute: 4 in fp32, 2 in bf16."""


def obstacle(zero: Mapping[str, Any]) -> str | None:
    """Setting of DeepSpeed's `zero_optimization` section that whole weights contradict, if any."""
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name)
        if isinstance(section, Mapping) and section.get("device", "none") not in ("none", None):
            return name
    for name in (
        "zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
    ):  # fmt: skip
        if zero.get(name) not in (None, False, AUTO):
            return name
    if zero.get("zero_hpz_partition_size", 1) not in (1, AUTO):
        return "zero_hpz_partition_size"
    return None


def asks_for_partitioning(zero: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's settings say which weights stay whole, instead of "auto" or nothing."""
    return zero.get(_PERSISTENCE, AUTO) != AUTO


def whole_bytes(sizes: Sizes) -> int:
    """Bytes of a rank that keeps all weights whole: weights, gradients, masters, moments, momentum
    averages, and the buffers of the exchanges; no activations."""
    size, own = sizes.compute_bytes, -(-sizes.trainable // sizes.ranks)
    weights = size * (sizes.trainable + sizes.other)
    gradients = size * sizes.trainable
    exchanged = 0
    if sizes.ranks > 1:
        exchanged = weights // sizes.ranks + size * max(sizes.trainable, sizes.other)
        if sizes.accumulation > 1:
            exchanged += _FP32 * sizes.trainable  # sums of the micro-steps before the exchange
    states = 3 * _FP32 * own  # two moments, the averaged gradient
    if size != _FP32:
        states += _FP32 * (own + -(-sizes.other // sizes.ranks))  # masters, momentum averages
    return weights + gradients + exchanged + states


def fits(sizes: Sizes, memory_bytes: float) -> bool:
    """Whether whole weights leave enough of a device's memory for activations."""
    return whole_bytes(sizes) <= SHARE_FOR_STATES * memory_bytes
