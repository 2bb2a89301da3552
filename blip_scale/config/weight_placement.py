"""Choose the placement of weights under ZeRO-3: whole on every rank, or partitioned over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
SHARE_FOR_STATES = 0.5
"""Share of a device's memory allowed for weights, gradients and optimizer with whole weights. The
rest is for activations."""
_FP32 = 4
_PERSISTENCE = "stage3_param_persistence_threshold"


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the memory of weights, gradients and optimizer."""

    trainable: int
    """Number of elements of all trainable parameters."""
    other: int
    """Number of elements of momentum copies and frozen parameters."""
    ranks: int
    accumulation: int
    """Number of micro-steps per optimizer step."""
    compute_bytes: int
    """Bytes per weight in the forward pass: 4 in fp32, 2 in bf16."""


def obstacle(zero: Mapping[str, Any]) -> str | None:
    """Return the first setting of `zero_optimization` that contradicts whole weights, or None."""
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
    """Return True if DeepSpeed's settings set a persistence threshold other than "auto"."""
    return zero.get(_PERSISTENCE, AUTO) != AUTO


def whole_bytes(sizes: Sizes) -> int:
    """Return the bytes that a rank with whole weights needs, without activations.

    They include weights, gradients, master weights, moments, momentum averages and the buffers of
    the collectives.
    """
    size, trainable_slice = sizes.compute_bytes, -(-sizes.trainable // sizes.ranks)
    weights = size * (sizes.trainable + sizes.other)
    gradients = size * sizes.trainable
    exchanged = 0
    if sizes.ranks > 1:
        exchanged = weights // sizes.ranks + size * max(sizes.trainable, sizes.other)
        if sizes.accumulation > 1:
            exchanged += _FP32 * sizes.trainable  # sums of the micro-steps before the exchange
    states = 3 * _FP32 * trainable_slice  # two moments, the averaged gradient
    if size != _FP32:
        other_slice = -(-sizes.other // sizes.ranks)
        states += _FP32 * (trainable_slice + other_slice)  # masters, momentum averages
    return weights + gradients + exchanged + states


def fits(sizes: Sizes, memory_bytes: float) -> bool:
    """Return True if whole weights leave enough of a device's memory for activations."""
    return whole_bytes(sizes) <= SHARE_FOR_STATES * memory_bytes
