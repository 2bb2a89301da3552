"""What the exchanges between ranks cost: calls, bytes, and the time that this rank was blocked in
them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

KINDS = {
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_gather_object": "other",
    "all_to_all_single": "other",
    "barrier": "other",
    "broadcast": "other",
    "reduce": "other",
}
"""Function of torch.distributed -> the name under which it is counted."""


@dataclass
class Cost:
    """Of the calls of one kind."""

    calls: int = 0
    bytes: int = 0
    """Of the whole tensors that were put together or summed; a rank sends and receives about as
    many in a gather or a scatter, twice as many in a sum."""
    blocked_s: float = 0.0
    """Time in which this rank's main thread did nothing but wait for other ranks and the wire."""


class CommunicationMeter:
    """Counts every exchange that this rank takes part in, DeepSpeed's and ours.

    It stands in front of the functions of torch.distributed, so `install` must come before
    DeepSpeed takes hold of them. A call costs a microsecond or two more.

    On the CPU an exchange blocks the caller, in the call or in the `wait` of the handle that it
    gives, and `blocked_s` is all of it. On a GPU exchanges are kernels on streams of their own: the
    host goes on, and `blocked_s` is the small part in which it does not. Never run on a GPU.
    """

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {kind: Cost() for kind in dict.fromkeys(KINDS.values())}
        """By kind, since the last `reset`."""
        self._originals: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        """Begin to count."""
        for name, kind in KINDS.items():
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counted(self._originals[name], kind))

    def remove(self) -> None:
        """Give torch.distributed its own functions back."""
        for name, original in self._originals.items():
            setattr(dist, name, original)
        self._originals = {}

    def reset(self) -> None:
        """Count from zero."""
        for cost in self.costs.values():
            cost.calls, cost.bytes, cost.blocked_s = 0, 0, 0.0

    def metrics(self) -> dict[str, float]:
        """Since the last `reset`: `blocked_s` in all, and for the curves the seconds by kind, calls
        and gigabytes."""
        costs = self.costs.values()
        found = {f"communication/{kind}_s": cost.blocked_s for kind, cost in self.costs.items()}
        return found | {
            "communication/calls_per_step": float(sum(cost.calls for cost in costs)),
            "communication/gigabytes_per_step": sum(cost.bytes for cost in costs) / 1e9,
            "blocked_s": sum(cost.blocked_s for cost in costs),
        }

    def _counted(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            cost = self.costs[kind]
            cost.calls += 1
            cost.bytes += max(map(_size, (*arguments, *named.values())), default=0)
            began = time.perf_counter()
            try:
                work = function(*arguments, **named)
            finally:
                cost.blocked_s += time.perf_counter() - began
            return work if work is None else _TimedWork(work, cost)

        return call


class _TimedWork:
    """The handle of an exchange under way, with a clock at its `wait`."""

    def __init__(self, work: Any, cost: Cost) -> None:
        self._work, self._cost = work, cost

    def wait(self, *arguments: Any, **named: Any) -> Any:
        """That of torch's handle."""
        began = time.perf_counter()
        try:
            return self._work.wait(*arguments, **named)
        finally:
            self._cost.blocked_s += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _size(argument: Any) -> int:
    """Bytes of a tensor or of a list of them."""
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, list):
        return sum(map(_size, argument))
    return 0
