"""Bytes of weights, gradients, optimizer states and momentum copies on a rank under ZeRO.

The formulas follow the source of DeepSpeed 0.19.8. The tests compare them with measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blip_scale.config import weight_placement
from blip_scale.config.recipe import Recipe
from blip_scale.planning.network import Network

_FP32 = 4
_DEFAULT_BUCKET = 5e8
_DEFAULT_LIVE = 1e9
_DEFAULT_PREFETCH = 5e7
_DEFAULT_PERSISTENT = 1e5


@dataclass(frozen=True)
class Sharding:
    """Settings of DeepSpeed that determine how states are partitioned."""

    stage: int
    ranks: int
    offload: bool
    compute_bytes: int
    """Bytes per element of the compute weights."""
    reduce_bucket: float = _DEFAULT_BUCKET
    has_bucket: bool = True
    """Whether ZeRO-3 collects gradients in a bucket until they are reduced."""
    overlap: bool = False
    prefetch: float = _DEFAULT_PREFETCH
    persistent: float = _DEFAULT_PERSISTENT
    """Maximum number of elements of a parameter that ZeRO-3 does not partition."""
    live: float = _DEFAULT_LIVE
    """Maximum number of gathered elements that ZeRO-3 keeps because they will be reused."""
    whole: bool = False
    """Whether ZeRO-3 on several ranks keeps weights gathered between the passes."""

    @property
    def partitions(self) -> bool:
        """Whether weights are partitioned, and gathered during the passes."""
        return self.stage == 3 and self.ranks > 1 and not self.whole

    @staticmethod
    def of(ds_config: Mapping[str, Any], ranks: int, compute_bytes: int) -> Sharding:
        """Read DeepSpeed's settings. Missing and "auto" values get DeepSpeed's defaults."""
        zero = ds_config["zero_optimization"]

        def number(name: str, default: float) -> float:
            value = zero.get(name, default)
            return default if value == "auto" else float(value)

        stage = zero["stage"]
        overlap = zero.get("overlap_comm", stage == 3)
        has_bucket = zero.get("contiguous_gradients", True)
        if stage == 3 and has_bucket == "auto":
            has_bucket = ranks > 1
        return Sharding(
            stage=stage,
            ranks=ranks,
            offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            compute_bytes=compute_bytes,
            reduce_bucket=number("reduce_bucket_size", _DEFAULT_BUCKET),
            has_bucket=bool(has_bucket),
            overlap=bool(overlap),
            prefetch=number("stage3_prefetch_bucket_size", _DEFAULT_PREFETCH),
            persistent=number("stage3_param_persistence_threshold", _DEFAULT_PERSISTENT),
            live=min(
                number("stage3_max_live_parameters", _DEFAULT_LIVE),
                number("stage3_max_reuse_distance", _DEFAULT_LIVE),
            ),
        )


def placed(
    sharding: Sharding, recipe: Recipe, zero: Mapping[str, Any], network: Network, limit: float
) -> Sharding:
    """Resolve `train.whole_weights` for devices with `limit` bytes of memory."""
    wanted, obstacle = recipe.train.whole_weights, weight_placement.obstacle(zero)
    if sharding.stage != 3 or wanted is False or obstacle:
        return sharding
    if wanted == "auto":
        if weight_placement.asks_for_partitioning(zero):
            return sharding
        trained = sum(network.trainable)
        other = sum(network.frozen) + sum(network.momentum)
        accumulation = (
            2  # assume accumulation: it needs more memory, and the micro-batch may be unresolved
        )
        sizes = weight_placement.Sizes(
            trained, other, sharding.ranks, accumulation, sharding.compute_bytes
        )
        if not weight_placement.fits(sizes, limit):
            return sharding
    return dataclasses.replace(sharding, whole=True)


@dataclass(frozen=True)
class States:
    """Bytes that one rank needs, by use."""

    resting: dict[str, float]
    """Bytes on the GPU during the whole run."""
    backward: dict[str, float]
    """Bytes on the GPU during micro-steps."""
    update: dict[str, float]
    """Bytes on the GPU during the optimizer step, when there are no activations."""
    host: dict[str, float]
    """Bytes in host memory."""


def states(network: Network, sharding: Sharding, accumulation: int = 1) -> States:
    """Bytes of the rank that needs most memory.

    Under ZeRO-1/2 a rank owns a contiguous range of all concatenated parameters. In some ranges
    every parameter has a momentum copy, so the rank has one average for each of its masters. Frozen
    parameters have neither moments nor momentum copies, and their masters are in host memory.
    """
    if sharding.stage == 3 and sharding.whole:
        return _whole_states(network, sharding, accumulation)
    size, ranks = sharding.compute_bytes, sharding.ranks
    trained, copied = sum(network.trainable), sum(network.momentum)
    still, owned_still = sum(network.frozen), _shares(network.frozen, ranks)
    if sharding.stage == 3:
        owned = _shares(network.trainable, ranks)
        copies = _shares(network.momentum, ranks)
        averaged = copies
        sizes = [*network.trainable, *network.frozen, *network.momentum]
        persistent = [numel for numel in sizes if numel <= sharding.persistent]
        resting = {
            "weights": size * (owned + owned_still),
            "momentum_weights": size * copies,
            "persistent_weights": size * sum(persistent) if ranks > 1 else 0,
            "reduce_bucket": size * sharding.reduce_bucket if sharding.has_bucket else 0,
        }
        # Other frozen weights and momentum weights are used and released before the backward pass.
        swept = trained + network.swept
        live = min(swept, max(sharding.live, network.largest_module + sharding.prefetch))
        backward = {"gathered_weights": size * live if ranks > 1 else 0}
        update = {"gradient_copy": _FP32 * owned}
        gradients = _FP32 * owned
    else:
        owned = -(-trained // ranks)
        averaged = min(copied, owned)
        resting = {"weights": size * (trained + still), "momentum_weights": size * copied}
        buckets = (2 if sharding.overlap else 1) * sharding.reduce_bucket
        reduced = trained if sharding.stage == 1 else owned
        backward = {"reduce_bucket": size * buckets, "fresh_gradients": size * reduced}
        update = {"gradient_copy": _FP32 * owned, "momentum_refresh": size * copied}
        gradients = _FP32 * reduced
        backward["gradients"] = gradients
    # In fp32, masters and averages share memory with the weights.
    shared = sharding.stage == 3 and size == _FP32 and not sharding.offload
    masters, averaged = (0, 0) if shared else (owned, averaged)
    optimizer = {
        "masters": _FP32 * masters,
        "moments": 2 * _FP32 * owned,
        "momentum_averages": _FP32 * averaged,
    }
    host: dict[str, float] = {"frozen_masters": _FP32 * owned_still} if still else {}
    if sharding.offload:
        host |= {**optimizer, "gradients": gradients}
        backward.pop("gradients", None)
        update.pop("gradient_copy")
    else:
        resting |= optimizer
        if sharding.stage == 3:
            resting["gradients"] = gradients
    resting["contrast_state"] = network.contrast_bytes
    return _states(resting, backward, update, host)


def _whole_states(network: Network, sharding: Sharding, accumulation: int) -> States:
    """States under ZeRO-3 if weights and gradients stay gathered in flat buffers.

    Masters, moments and averages are partitioned. The gather and the reductions need two buffers:
    one for the rank's part of the weights, and one of the size of the larger network. Gradients of
    micro-steps are summed in fp32 before they are reduced. No test compares this estimate with a
    run.
    """
    size, ranks = sharding.compute_bytes, sharding.ranks
    trained, owned = sum(network.trainable), -(-sum(network.trainable) // ranks)
    other = sum(network.momentum) + sum(network.frozen)
    weights = size * (trained + other)
    buffers = weights // ranks + size * max(trained, other) if ranks > 1 else 0
    is_fp32 = (
        size == _FP32
    )  # on a single rank, masters and averages then share memory with the weights
    averaged = sum(network.momentum)
    resting = {
        "weights": size * (trained + sum(network.frozen)),
        "momentum_weights": size * sum(network.momentum),
        "gradients": size * trained,
        "averaged_gradients": _FP32 * owned,
        "exchange_buffers": buffers,
        "summed_gradients": _FP32 * trained if accumulation > 1 and ranks > 1 else 0,
        "masters": 0 if is_fp32 and ranks == 1 else _FP32 * owned,
        "moments": 2 * _FP32 * owned,
        "momentum_averages": 0 if is_fp32 and ranks == 1 else _FP32 * -(-averaged // ranks),
        "contrast_state": network.contrast_bytes,
    }
    return _states(resting, {}, {}, {})


def _states(*parts: Mapping[str, float]) -> States:
    return States(*({name: float(value) for name, value in part.items()} for part in parts))


def _shares(numels: list[int], ranks: int) -> int:
    """Number of elements on a rank if each parameter is divided evenly."""
    return sum(-(-numel // ranks) for numel in numels)


def checkpoint_bytes(network: Network) -> float:
    """Bytes of a checkpoint on disk: masters, moments, averages and the contrast's state."""
    trained, still = sum(network.trainable), sum(network.frozen)
    averaged = sum(network.momentum)
    return float(_FP32 * (3 * trained + still + averaged) + network.contrast_bytes)
