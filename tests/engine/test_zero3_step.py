"""The shorter ways through DeepSpeed's ZeRO-3 step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from blip_scale.engine.zero3_step import drop_idle_hooks, joined


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


def test_only_modules_with_something_to_gather_keep_their_hooks() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.GELU())
    heard: list[str] = []
    gathered: list[Any] = []
    offload = SimpleNamespace(module=network, forward_hooks=[], backward_hooks=[])
    for module in network:
        name = type(module).__name__
        module.ds_external_parameters = dict  # as DeepSpeed gives every module: none
        for parameter in module.parameters():
            parameter.ds_persist = name == "LayerNorm"  # type: ignore[attr-defined]
            parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
            parameter.all_gather = gathered.append  # type: ignore[attr-defined]
        before = module.register_forward_pre_hook(lambda *_, n=name: heard.append(f"before {n}"))
        after = module.register_forward_hook(lambda *_, n=name: heard.append(f"after {n}"))
        offload.forward_hooks.append(before)
        offload.backward_hooks.append(after)
    staying = list(network[1].parameters())
    drop_idle_hooks(SimpleNamespace(parameter_offload=offload, persistent_parameters=staying))

    network(torch.ones(1, 2))
    assert heard == ["before Linear", "after Linear"]
    assert gathered == []
    staying[0].ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
    network(torch.ones(1, 2))
    assert [[p is staying[0] for p in some] for some in gathered] == [[True]]
