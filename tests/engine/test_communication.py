"""Test the communication meter on a real process group of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from blip_scale.engine.watching import communication
from blip_scale.engine.watching.communication import CommunicationMeter


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[CommunicationMeter]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    meter = CommunicationMeter()
    meter.install()
    yield meter
    meter.remove()
    dist.destroy_process_group()


def test_calls_bytes_and_seconds_are_added_up_by_kind(meter: CommunicationMeter) -> None:
    tensor = torch.arange(1000.0)
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.arange(1000.0))
    gathered = torch.empty(1000, dtype=torch.bfloat16)
    work = dist.all_gather_into_tensor(gathered, tensor.bfloat16(), async_op=True)
    before = meter.costs["all_gather"].blocked_s
    work.wait()
    assert work.is_completed()
    assert meter.costs["all_gather"].blocked_s > before
    assert torch.equal(gathered, tensor.bfloat16())
    dist.all_gather([torch.empty(10)], torch.ones(10))
    dist.barrier()
    costs = meter.costs
    assert {kind: (cost.calls, cost.bytes) for kind, cost in costs.items()} == {
        "all_gather": (2, 2040), "reduce_scatter": (0, 0), "all_reduce": (1, 4000), "other": (1, 0),
    }  # fmt: skip
    metrics = meter.metrics()
    assert metrics["communication/calls_per_step"] == 4
    assert metrics["communication/gigabytes_per_step"] == 6040 / 1e9
    assert metrics["blocked_s"] == sum(cost.blocked_s for cost in costs.values()) > 0
    meter.reset()
    assert set(meter.metrics().values()) == {0.0}


def test_an_exchange_that_fails_fails_as_before(meter: CommunicationMeter) -> None:
    with pytest.raises(RuntimeError, match="root rank"):
        dist.broadcast(torch.ones(1), src=5)
    assert meter.costs["other"].calls == 1


def test_torch_gets_its_functions_back(meter: CommunicationMeter) -> None:
    assert dist.all_reduce.__module__ == communication.__name__
    meter.remove()
    assert all(
        getattr(dist, name).__module__ != communication.__name__ for name in communication.KINDS
    )
