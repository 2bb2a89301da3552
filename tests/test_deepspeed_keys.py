"""Settings in DeepSpeed's JSON that a run does not support are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip_scale.config import checks
from blip_scale.config.deepspeed_keys import TOP, ZERO_BY_STAGE, check_keys
from blip_scale.config.recipe import load

REPO = Path(__file__).resolve().parent.parent
SHIPPED = sorted((REPO / "ds_configs").glob("*.json"))


def refusal(tmp_path: Path, text: str) -> str:
    """Message of the error that a file with this content causes."""
    file = tmp_path / "ours.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"ours\.json") as caught:
        checks.resolve_deepspeed(load("demo"), file, 1)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


def with_changes(changes: dict[str, Any], stage: int = 3) -> str:
    """Text of the shipped JSON of a stage, with further settings."""
    config = json.loads((REPO / "ds_configs" / f"zero{stage}.json").read_text())
    for name, value in changes.items():
        config[name] = config[name] | value if name in config and value else value
    return json.dumps(config)


@pytest.mark.parametrize(
    "key",
    [
        "prescale_gradients", "gradient_predivide_factor", "elasticity", "tensor_parallel",
        "curriculum_learning", "data_efficiency", "compression_training", "autotuning",
        "hybrid_engine", "sparse_gradients", "disable_allgather", "activation_checkpointing",
        "compile", "checkpoint", "flops_profiler", "seq_parallel_communication_data_type",
        "gradient_allreduce_op", "sequence_parallel_size", "managed_gradient_accumulation",
    ],
)  # fmt: skip
def test_what_a_run_does_not_honour_is_refused(tmp_path: Path, key: str) -> None:
    for value in (True, {"enabled": True}, "auto"):
        message = refusal(tmp_path, with_changes({key: value}))
        assert message.startswith(f"{key}: not supported"), message


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        (3, {"gradient_acumulation_steps": 4}, "did you mean gradient_accumulation_steps?"),
        (3, {"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        (3, {"compile": {"deepcompile": True}}, "set model.compile in the recipe"),
        (3, {"communication_data_type": "fp16"}, 'expected fp32 or bf16, found "fp16"'),
        (3, {"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype: expected"),
        (3, {"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype: not supported"),
        (3, {"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size: no"),
        (2, {"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients: not"),
        (3, {"zero_optimization": {"zenflow": {}}}, "zero_optimization.zenflow: not supported"),
        (3, {"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights: not"),
        (3, {"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size: not"),
        (3, {"zero_optimization": {"stage3_max_live_parameter": 2}}, "mean stage3_max_live_param"),
        (3, {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
         "zero_optimization.offload_optimizer.ratio: not supported"),
        (3, {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
         'offload_optimizer.device: expected cpu or none, found "nvme"'),
        (2, {"zero_optimization": {"stage3_max_live_parameters": 1}}, "a setting of ZeRO stage 3"),
        (3, {"zero_optimization": {"allgather_bucket_size": 1}}, "a setting of ZeRO stage 2, but"),
        (3, {"zero_optimization": {"sub_group_size": -1}}, "expected a whole number, 1 or more"),
        (3, {"zero_optimization": {"sub_group_size": "1e9"}}, "expected a whole number, 1 or more"),
        (3, {"zero_optimization": {"overlap_comm": 1}}, "overlap_comm: expected true or false"),
        (3, {"bf16": {"immediate_grad_update": True}}, "bf16.immediate_grad_update: not supported"),
        (3, {"wall_clock_breakdown": "yes"}, "wall_clock_breakdown: expected true or false"),
        (3, {"timers": True}, "timers: expected an object, found true"),
    ],
)  # fmt: skip
def test_the_message_names_setting_and_mend(
    tmp_path: Path, stage: int, changes: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(tmp_path, with_changes(changes, stage))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"steps_per_print": 1, "steps_per_print": 2}', "steps_per_print is set twice"),
        ("[" * 100_000, "recursion"),
        ("[]", "expected a JSON object"),
    ],
    ids=["twice", "deep", "list"],
)
def test_what_is_no_settings_file_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_pass(path: Path) -> None:
    check_keys(json.loads(path.read_text()), path)


def test_every_setting_may_be_auto() -> None:
    for stage, settings in ZERO_BY_STAGE.items():
        zero = {"stage": stage} | dict.fromkeys(settings, "auto")
        check_keys(dict.fromkeys(TOP, "auto") | {"zero_optimization": zero}, Path("all.json"))
