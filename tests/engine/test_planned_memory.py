"""Compare the planned memory with the memory of DeepSpeed's engine, on 1, 2 and 4 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import REPO, WIDER, finish, launch, make_recipe, said

from blip_scale.config import recipe
from blip_scale.planning.network import network_of
from blip_scale.planning.states import Sharding, states
from blip_scale.tasks.by_name import contrast_of

pytestmark = pytest.mark.multiprocess

BUCKETS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "allgather_bucket_size")


def ds_config(folder: Path, stage: int) -> Path:
    """Write a shipped JSON with buckets and thresholds that fit the size of the tiny network."""
    config = json.loads((REPO / f"ds_configs/zero{stage}.json").read_text())
    zero = config["zero_optimization"]
    zero |= {name: 40_000 for name in BUCKETS if name in zero}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 300
    file = folder / "ds_config.json"
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(
    ("stage", "ranks", "precision", "adapts"),
    [
        (3, 1, "bf16", False),
        (3, 2, "bf16", False),
        (3, 4, "fp32", False),
        (3, 2, "bf16", True),
        (2, 1, "fp32", False),
        (2, 2, "bf16", False),
        (2, 4, "bf16", False),
        (2, 2, "bf16", True),
    ],
)
def test_states_are_what_deepspeed_holds(
    tmp_path: Path, stage: int, ranks: int, precision: str, adapts: bool
) -> None:
    train = {"precision": precision, "micro_batch_size": 2}
    sizes = dict(WIDER)
    if adapts:
        sizes |= {"vision": WIDER["vision"] | {"frozen_layers": 1}, "lora": {"rank": 8}}
    file = make_recipe(tmp_path, train=train, model=sizes)
    config = ds_config(tmp_path, stage)
    script = Path(__file__).with_name("held_by_a_run.py")
    codes = finish(launch(file, ranks, "--deepspeed", str(config), stage=stage, script=script))
    assert codes == [0] * ranks, said(file)
    measured = [json.loads((tmp_path / f"held_{rank}.json").read_text()) for rank in range(ranks)]

    chosen = recipe.load(str(file))
    sharding = Sharding.of(json.loads(config.read_text()), ranks, 4 if precision == "fp32" else 2)
    planned = states(network_of(chosen, contrast_of), sharding)
    resting = sum(planned.resting.values()) + planned.host.get("frozen_masters", 0)
    most = {moment: max(rank[moment] for rank in measured) for moment in measured[0]}
    assert resting == pytest.approx(most["update"], rel=0.1)
    gradients = planned.backward.get("gradients", 0)
    assert resting + gradients == pytest.approx(most["backward"], rel=0.1)
    gathered = planned.backward.get("gathered_weights", 0)
    if adapts:  # the plan for frozen layers is an upper limit
        assert most["gathered"] <= gathered <= 1.3 * most["gathered"]
    else:
        assert gathered == pytest.approx(most["gathered"], rel=0.1)
