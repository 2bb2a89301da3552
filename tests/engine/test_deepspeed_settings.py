"""Real runs with a non-default value of every allowed DeepSpeed setting.

Settings that only change how parameters and gradients are communicated do not change the losses.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from blip_scale.config.deepspeed_keys import TOP, ZERO_BY_STAGE
from blip_scale.engine.zero import engine

pytestmark = pytest.mark.multiprocess

RANKS = 2
TALKATIVE: dict[str, Any] = {
    "steps_per_print": 1,
    "wall_clock_breakdown": True,
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "zero_allow_untested_optimizer": True,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "fp16": {"enabled": False},
    "amp": {"enabled": False},
    "torch_autocast": {"enabled": False},
}
SMALL: dict[str, Any] = {
    "overlap_comm": False,
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 3000,
}
ZERO: dict[str, dict[str, Any]] = {
    "2": SMALL | {"allgather_bucket_size": 3000, "allgather_partitions": False},
    "3": SMALL
    | {
        "reduce_scatter": True,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
        "stage3_max_live_parameters": 1000,
        "stage3_max_reuse_distance": 0,
        "sub_group_size": 5000,
        "memory_efficient_linear": True,
    },
    "2 offloaded": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "3 offloaded": {
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
    },
}
"""Name of a case -> stage and settings of `zero_optimization`."""


def losses(folder: Path, name: str, changes: dict[str, Any], stage: int) -> list[float]:
    """Return the total losses of three steps with changed settings."""
    recipe = tiny_runs.make_recipe(folder, train={"max_steps": 3})
    config = json.loads((tiny_runs.REPO / "ds_configs" / f"zero{stage}.json").read_text())
    tiny_runs._merge(config, changes)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config))
    run = folder / name
    tiny_runs.train(recipe, RANKS, f"--deepspeed={file}", f"output_dir={run}", stage=stage)
    return [step["loss/total"] for step in tiny_runs.losses(run).values()]


def compiled_files() -> list[str]:
    """Return the files of the offload optimizer (cpu_adam) that ninja has compiled."""
    engine._set_up_compiling()
    log = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam" / ".ninja_log"
    lines = log.read_text().splitlines()[1:] if log.is_file() else []
    return [line.split("\t")[3] for line in lines]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return environment variables for a compiler without optimisation, and its output folder.

    Compiling with DeepSpeed's flags would take twice as long.
    """
    folder = tmp_path_factory.mktemp("compiled")
    script = folder / "c++"
    script.write_text('#!/bin/sh\nexec c++ "$@" -O0 -g0\n')
    script.chmod(0o755)
    return {"CXX": str(script), "TORCH_EXTENSIONS_DIR": str(folder)}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_takes_every_setting(
    tmp_path: Path, stage: int, compiler: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks need an operation that is compiled at its first use. Only one compiles it."""
    for name, value in compiler.items():
        monkeypatch.setenv(name, value)
    before = compiled_files()
    expected = losses(tmp_path, "shipped", {}, stage)
    for name in (f"{stage}", f"{stage} offloaded"):
        changes = TALKATIVE | {"zero_optimization": ZERO[name]}
        measured = losses(tmp_path, name.replace(" ", "_"), changes, stage)
        assert measured == pytest.approx(expected, rel=1e-4), name
    made = compiled_files()[len(before) :]
    assert len(made) == len(set(made)), "each file once"
    assert compiled_files()


def test_nothing_on_the_list_is_left_out() -> None:
    """Every allowed setting is tested here.

    Batch sizes, clipping, bf16, optimizer and scheduler need no case: every run sets them.
    """
    of_the_recipe = {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "optimizer", "scheduler", "bf16",
    }  # fmt: skip
    assert TALKATIVE.keys() | of_the_recipe == TOP.keys()
    for stage, settings in ZERO_BY_STAGE.items():
        tried = ZERO[f"{stage}"].keys() | ZERO[f"{stage} offloaded"].keys()
        assert settings.keys() <= tried
