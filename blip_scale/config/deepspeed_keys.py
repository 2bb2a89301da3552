"""Settings allowed in DeepSpeed's JSON.

DeepSpeed ignores unknown keys, and accepts settings that would break or change a run. Both are
refused here, before anything is loaded. `tests/engine/test_deepspeed_settings.py` trains with every
allowed setting.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

AUTO = "auto"

Judge = Callable[[Any], str | None]
"""Function that checks a value, and returns a description of the problem, or None."""


def _truth(value: Any) -> str | None:
    return None if isinstance(value, bool) else "expected true or false"


def _anything(value: Any) -> str | None:
    return None


def _number_from(low: int) -> Judge:
    def judge(value: Any) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value == int(value) and value >= low:
            return None
        return f"expected a whole number, {low} or more"

    return judge


def _one_of(*names: str) -> Judge:
    return lambda value: None if value in names else f"expected {' or '.join(names)}"


_ENABLED = {"enabled": _truth}
_OFFLOAD = {"device": _one_of("cpu", "none"), "pin_memory": _truth}
_ZERO = {
    "stage": _anything,  # checked with the recipe
    "overlap_comm": _truth,
    "contiguous_gradients": _truth,
    "reduce_bucket_size": _number_from(1),
    "reduce_scatter": _truth,
    "offload_optimizer": _OFFLOAD,
}
ZERO_BY_STAGE: dict[int, dict[str, Any]] = {
    2: {"allgather_bucket_size": _number_from(1), "allgather_partitions": _truth},
    3: {
        "stage3_prefetch_bucket_size": _number_from(0),
        "stage3_param_persistence_threshold": _number_from(0),
        "stage3_model_persistence_threshold": _number_from(0),
        "stage3_max_live_parameters": _number_from(0),
        "stage3_max_reuse_distance": _number_from(0),
        "sub_group_size": _number_from(1),
        "memory_efficient_linear": _truth,
        "offload_param": _OFFLOAD,
    },
}
"""ZeRO stage -> settings of `zero_optimization` for this stage only."""
TOP: dict[str, Any] = {
    # Checked against the recipe:
    "train_batch_size": _anything,
    "train_micro_batch_size_per_gpu": _anything,
    "gradient_accumulation_steps": _anything,
    "gradient_clipping": _anything,
    "optimizer": _anything,
    "scheduler": _anything,
    "bf16": _ENABLED,
    "fp16": _ENABLED,
    "amp": _ENABLED,
    "torch_autocast": _ENABLED,
    # Not in the recipe:
    "data_types": {"grad_accum_dtype": _one_of("fp32")},
    "communication_data_type": _one_of("fp32", "bf16"),
    "zero_allow_untested_optimizer": _truth,
    "steps_per_print": _number_from(1),
    "wall_clock_breakdown": _truth,
    "timers": {"throughput": {"enabled": _truth, "synchronized": _truth}},
}
"""Setting -> function that checks its value, or the settings nested in it."""

_INSTEAD = {
    "activation_checkpointing": "set model.gradient_checkpointing in the recipe",
    "compile": "DeepCompile is not supported; set model.compile in the recipe",
    "flops_profiler": "every run logs speed/mfu",
    "tensorboard": "every run writes TensorBoard's curves",
    "wandb": "every run writes TensorBoard's curves",
    "csv_monitor": "every run writes metrics.jsonl",
    "checkpoint": "the recipe's checkpoint section decides",
    "curriculum_learning": "the recipe's data section sets the order of the data",
    "data_efficiency": "the recipe's data section sets the order of the data",
    "elasticity": "train.max_micro_batch_size adapts a recipe to more or fewer ranks",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
        "checkpoints hold each rank's slices; blip-scale convert gathers whole weights"
    ),
}
"""Refused setting -> alternative to suggest."""


def check_keys(config: Mapping[str, Any], path: Path) -> None:
    """Refuse settings that are not allowed, or have a value that is not supported.

    Args:
        config: DeepSpeed's settings as read; "auto" is allowed everywhere.
        path: file of the settings, for the error.

    Raises:
        ValueError: a setting is refused. The message names it, and the nearest allowed one.
    """
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    stage = zero.get("stage")
    stages = [stage] if stage in ZERO_BY_STAGE else list(ZERO_BY_STAGE)
    settings = dict(_ZERO)
    for number, extra in ZERO_BY_STAGE.items():
        if number in stages:
            settings |= extra
            continue
        misplaced = sorted(extra.keys() & zero.keys())
        if misplaced:
            raise ValueError(
                f"{path}: zero_optimization.{misplaced[0]}: a setting of ZeRO stage {number}, but "
                f"stage is {stage}; remove it"
            )
    _check(config, TOP | {"zero_optimization": settings}, "", path)


def _check(section: Mapping[str, Any], allowed: Mapping[str, Any], prefix: str, path: Path) -> None:
    for key, value in section.items():
        name = f"{prefix}{key}"
        if key not in allowed:
            raise ValueError(f"{path}: {name}: {_advice(key, name, allowed)}")
        if value == AUTO:
            continue
        rule = allowed[key]
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name}: expected an object, found {json.dumps(value)}")
            _check(value, rule, f"{name}.", path)
            continue
        problem = rule(value)
        if problem:
            raise ValueError(f"{path}: {name}: {problem}, found {json.dumps(value)}")


def _advice(key: str, name: str, allowed: Mapping[str, Any]) -> str:
    if name in _INSTEAD:
        return f"not supported; remove it ({_INSTEAD[name]})"
    near = difflib.get_close_matches(key, allowed, 1, 0.7)
    if near:
        return f"not supported; did you mean {near[0]}? If not, remove it"
    return f"not supported; remove it ({', '.join(sorted(allowed))} are supported)"
