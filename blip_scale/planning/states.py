"""Bytes of weights, gradients, optimizer and momentum copies that a rank holds under ZeRO.

What DeepSpeed 0.19.8 does with the engine of a run: read in its source and measured by the tests.
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
    """How states lie on ranks: the part of DeepSpeed's settings that memory depends on."""

    stage: int
    ranks: int
    offload: bool
    compute_bytes: int
    """Of an element of the weights that compute."""
    reduce_bucket: float = _DEFAULT_BUCKET
    has_bucket: bool = True
    """Under ZeRO-3: whether gradients lie in the bucket until they are reduced."""
    overlap: bool = False
    prefetch: float = _DEFAULT_PREFETCH
    persistent: float = _DEFAULT_PERSISTENT
    """ZeRO-3 keeps parameters up to this size whole."""
    live: float = _DEFAULT_LIVE
    """ZeRO-3 keeps gathered what it will use again within so many elements."""
    whole: bool = False
    """Whether ZeRO-3 on several ranks keeps weights whole between the passes."""

    @property
    def partitions(self) -> bool:
        """Whether a rank holds a part of each weight, gathered in the passes."""
        return self.stage == 3 and self.ranks > 1 and not self.whole

    @staticmethod
    def of(ds_config: Mapping[str, Any], ranks: int, compute_bytes: int) -> Sharding:
        """From DeepSpeed's settings, "auto" resolved or not; DeepSpeed's defaults where they are
        silent."""
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
    """The sharding as a run decides it (`train.whole_weights`) on devices of `limit` bytes."""
    wanted, obstacle = recipe.train.whole_weights, weight_placement.obstacle(zero)
    if sharding.stage != 3 or wanted is False or obstacle:
        return sharding
    if wanted == "auto":
        if weight_placement.asks_for_partitioning(zero):
            return sharding
        trained = sum(network.trainable)
        other = sum(network.frozen) + sum(network.momentum)
        accumulation = 2  # the larger need; the micro-batch may not be settled yet
        sizes = weight_placement.Sizes(
            trained, other, sharding.ranks, accumulation, sharding.compute_bytes
        )
        if not weight_placement.fits(sizes, limit):
            return sharding
    return dataclasses.replace(sharding, whole=True)


@dataclass(frozen=True)
class States:
    """Bytes of one rank."""

    resting: dict[str, float]
    """On the GPU for the whole run."""
    backward: dict[str, float]
    """On the GPU while micro-steps run."""
    update: dict[str, float]
    """On the GPU in the optimizer step, when no activation is left."""
    host: dict[str, float]
    """In the memory of the node, a rank."""


def states(network: Network, sharding: Sharding, accumulation: int = 1) -> States:
    """Bytes of the rank that holds most.

    Below ZeRO-3 a rank owns a stretch of all parameters laid end to end, and some stretches have
    momentum copies throughout: that rank holds an average for each of its masters. Frozen
    parameters have neither moments nor averages; their masters lie on the host.
    """
    if sharding.stage == 3 and sharding.whole:
        return _whole_states(network, sharding, accumulation)
    size, ranks = sharding.compute_bytes, sharding.ranks
    trained, copied = sum(network.trainable), sum(network.momentum)
    still, own_still = sum(network.frozen), _shares(network.frozen, ranks)
    if sharding.stage == 3:
        own = _shares(network.trainable, ranks)
        copies = _shares(network.momentum, ranks)
        averaged = max(copies - own_still, 0)
        sizes = [*network.trainable, *network.frozen, *network.momentum]
        kept = [numel for numel in sizes if numel <= sharding.persistent]
        resting = {
            "weights": size * (own + own_still),
            "momentum_weights": size * copies,
            "persistent_weights": size * sum(kept) if ranks > 1 else 0,
            "reduce_bucket": size * sharding.reduce_bucket if sharding.has_bucket else 0,
        }
        # Frozen and momentum weights are released after their use, which comes before the sweep's.
        live = min(trained, max(sharding.live, network.largest_module + sharding.prefetch))
        backward = {"gathered_weights": size * live if ranks > 1 else 0}
        update = {"gradient_copy": _FP32 * own}
        gradients = _FP32 * own
    else:
        own = -(-trained // ranks)
        averaged = max(min(copied - still, own), 0)
        resting = {"weights": size * (trained + still), "momentum_weights": size * copied}
        buckets = (2 if sharding.overlap else 1) * sharding.reduce_bucket
        reduced = trained if sharding.stage == 1 else own
        backward = {"reduce_bucket": size * buckets, "fresh_gradients": size * reduced}
        update = {"gradient_copy": _FP32 * own, "momentum_refresh": size * max(copied - still, 0)}
        gradients = _FP32 * reduced
        backward["gradients"] = gradients
    shared = sharding.stage == 3 and size == _FP32 and not sharding.offload  # with the weights
    masters, averaged = (0, 0) if shared else (own, averaged)
    optimizer = {
        "masters": _FP32 * masters,
        "moments": 2 * _FP32 * own,
        "momentum_averages": _FP32 * averaged,
    }
    host: dict[str, float] = {"frozen_masters": _FP32 * own_still} if still else {}
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
    """ZeRO-3 on several ranks that keeps weights and gradients whole in flat memory; masters,
    moments and averages are partitioned. An estimate: no test holds it against a run.

    One flat gather and the reductions need buffers: a rank's part of the weights, and the larger of
    both networks whole. Micro-steps are summed in fp32 before gradients are reduced.
    """
    size, ranks = sharding.compute_bytes, sharding.ranks
    trained, own = sum(network.trainable), -(-sum(network.trainable) // ranks)
    other = sum(network.momentum) + sum(network.frozen)
    weights = size * (trained + other)
    buffers = weights // ranks + size * max(trained, other) if ranks > 1 else 0
    is_fp32 = size == _FP32  # masters and averages are the weights themselves on one rank alone
    averaged = max(sum(network.momentum) - sum(network.frozen), 0)
    resting = {
        "weights": size * (trained + sum(network.frozen)),
        "momentum_weights": size * sum(network.momentum),
        "gradients": size * trained,
        "averaged_gradients": _FP32 * own,
        "exchange_buffers": buffers,
        "summed_gradients": _FP32 * trained if accumulation > 1 and ranks > 1 else 0,
        "masters": 0 if is_fp32 and ranks == 1 else _FP32 * own,
        "moments": 2 * _FP32 * own,
        "momentum_averages": 0 if is_fp32 and ranks == 1 else _FP32 * -(-averaged // ranks),
        "contrast_state": network.contrast_bytes,
    }
    return _states(resting, {}, {}, {})


def _states(*parts: Mapping[str, float]) -> States:
    return States(*({name: float(value) for name, value in part.items()} for part in parts))


def _shares(numels: list[int], ranks: int) -> int:
    """Elements of a rank where each parameter is cut evenly."""
    return sum(-(-numel // ranks) for numel in numels)


def checkpoint_bytes(network: Network) -> float:
    """A checkpoint on the disk: masters, moments, momentum averages, the contrast's state; of all
    ranks."""
    trained, still = sum(network.trainable), sum(network.frozen)
    averaged = max(sum(network.momentum) - still, 0)
    return float(_FP32 * (3 * trained + still + averaged) + network.contrast_bytes)
