"""Test the patches of DeepSpeed's ZeRO-3 step."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from tiny_runs import REPO
from torch import nn

from blip_scale.engine import collectives
from blip_scale.engine.zero import deepspeed_patches
from blip_scale.engine.zero.deepspeed_patches import (
    drop_idle_hooks,
    gather_together,
    joined,
)


def test_pieces_that_lie_end_to_end_are_one_view() -> None:
    flat = torch.arange(10.0)
    whole = joined([flat[2:5], flat[5:6], flat[6:10]])
    assert whole is not None
    assert torch.equal(whole, flat[2:])
    whole.zero_()
    assert flat.tolist() == [0.0, 1.0] + 8 * [0.0]


def test_other_pieces_are_not() -> None:
    flat = torch.arange(10.0)
    assert joined([flat[:3], flat[4:]]) is None  # a gap
    assert joined([flat[4:], flat[:4]]) is None  # another order
    assert joined([flat[:4], torch.arange(6.0)]) is None  # another storage
    assert joined([flat[:4], flat[4:8].view(2, 2)]) is None
    assert joined([flat[:4].view(torch.int32), flat[4:]]) is None


def test_only_modules_with_something_to_gather_keep_their_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.GELU())
    heard: list[str] = []
    gathered: list[Any] = []
    monkeypatch.setattr(deepspeed_patches, "gather_together", gathered.append)
    offload = SimpleNamespace(module=network, forward_hooks=[], backward_hooks=[])
    for module in network:
        name = type(module).__name__
        module.ds_external_parameters = dict  # DeepSpeed sets this on every module
        for parameter in module.parameters():
            parameter.ds_persist = name == "LayerNorm"  # type: ignore[attr-defined]
            parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
        before = module.register_forward_pre_hook(lambda *_, n=name: heard.append(f"before {n}"))
        after = module.register_forward_hook(lambda *_, n=name: heard.append(f"after {n}"))
        offload.forward_hooks.append(before)
        offload.backward_hooks.append(after)
    staying = list(network[1].parameters())
    zero = SimpleNamespace(parameter_offload=offload, persistent_parameters=staying)
    drop_idle_hooks(zero)
    assert zero.persistent_parameters == []

    network(torch.ones(1, 2))
    assert heard == ["before Linear", "after Linear"]
    assert gathered == []
    staying[0].ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
    network(torch.ones(1, 2))
    assert [[p is staying[0] for p in some] for some in gathered] == [[True]]


@pytest.mark.parametrize("quantized", [False, True])
def test_small_weights_are_gathered_in_one_exchange(
    monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    """The weights have 1, 2 and 15 elements. Their parts on 3 ranks are padded to equal sizes."""
    weights = [torch.randn(shape) for shape in ((1,), (2,), (3, 5))]
    parts = [nn.functional.pad(w.flatten(), (0, -w.numel() % 3)).view(3, -1) for w in weights]
    parameters = [nn.Parameter(torch.empty(0)) for _ in weights]
    gathered_by_deepspeed: list[Any] = []
    for parameter, weight, part in zip(parameters, weights, parts, strict=True):
        parameter.ds_tensor = part[1].to(torch.int8) if quantized else part[1]  # type: ignore[attr-defined]
        parameter.ds_numel, parameter.ds_shape = weight.numel(), weight.shape  # type: ignore[attr-defined]
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
        parameter.all_gather = gathered_by_deepspeed.append  # type: ignore[attr-defined]
    sent: list[torch.Tensor] = []

    def all_gather(parts_of_rank: torch.Tensor) -> torch.Tensor:
        sent.append(parts_of_rank)
        return torch.cat(parts, dim=1)

    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    monkeypatch.setattr(collectives, "all_gather", all_gather)
    gather_together(parameters)
    if quantized:
        assert gathered_by_deepspeed == [parameters] and not sent
        return
    assert len(sent) == 1 and torch.equal(sent[0], torch.cat(parts, dim=1)[1:2])
    for parameter, weight in zip(parameters, weights, strict=True):
        assert torch.equal(parameter, weight) and parameter.is_contiguous()
        assert parameter.ds_status is ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


INITIALIZED = """
import os
import torch
from torch import nn
from blip_scale.config import checks, recipe
from blip_scale.engine.zero.engine import initialize, start

torch.set_num_threads(2)
start(60.0)
chosen = recipe.load("demo", ["train.global_batch_size=2", "train.micro_batch_size=2"])
ds_config = checks.resolve_deepspeed(chosen, "ds_configs/zero3.json", 1)
initialize(lambda: nn.Linear(400, 400), chosen, ds_config)
torch.ones(10**6).add_(1)
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print("found", torch.get_num_threads(), sum(name.startswith("pt_gloo_runloop") for name in names))
"""


@pytest.mark.multiprocess
def test_exchanging_threads_have_no_helpers_of_their_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INITIALIZED],
        cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    groups, threads_of_a_group = 2, 2  # torch's own group and DeepSpeed's
    assert f"found 2 {groups * threads_of_a_group}\n" in done.stdout, done.stderr
