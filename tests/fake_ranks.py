"""Several ranks as threads of one process, for fast tests of collectives.

No process group is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from blip_scale.engine import collectives

T = TypeVar("T")


class FakeRanks:
    """`world_size` threads that meet in `blip_scale.engine.collectives`.

    A rank that fails breaks the barrier, so that the others fail, too, instead of waiting forever.
    """

    def __init__(self, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._world_size = world_size
        self._here = threading.local()
        self._meeting = threading.Barrier(world_size, timeout=60)
        self._values: list[Any] = [None] * world_size
        replaced: dict[str, Callable[..., Any]] = {
            "rank": lambda: self._here.rank,
            "world_size": lambda: world_size,
            "barrier": self._meeting.wait,
            "all_gather_objects": self._exchange,
            "all_gather_ragged": lambda tensor: [t.clone() for t in self._exchange(tensor)],
            "all_gather": lambda tensor: torch.cat(self._exchange(tensor)),
            "all_gather_with_gradient": lambda tensor: torch.cat(self._exchange(tensor)),
            "all_reduce_sum": self._sum,
        }
        for name, replacement in replaced.items():
            monkeypatch.setattr(collectives, name, replacement)

    def run(self, function: Callable[[int], T]) -> list[T]:
        """`function(rank)` on every rank; the results in rank order."""
        with ThreadPoolExecutor(self._world_size) as threads:
            running = [threads.submit(self._as_rank, function, r) for r in range(self._world_size)]
            return [future.result() for future in running]

    def _as_rank(self, function: Callable[[int], T], rank: int) -> T:
        self._here.rank = rank
        try:
            return function(rank)
        except BaseException:
            self._meeting.abort()
            raise

    def _exchange(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order."""
        self._values[self._here.rank] = value
        self._meeting.wait()
        values = list(self._values)
        self._meeting.wait()  # nobody puts the next value before all have taken these
        return values

    def _sum(self, tensor: Tensor) -> Tensor:
        total = torch.stack(self._exchange(tensor.clone())).sum(dim=0)
        return tensor.copy_(total)
