"""Meter for collectives: calls, bytes, and the time that this rank was blocked.

Monkey patches functions of torch.distributed (`KINDS`); tests/engine/test_communication.py guards
them.
"""

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
"""Function of torch.distributed -> kind of collective in the metrics."""


@dataclass
class Cost:
    """Cost of the calls of one kind."""

    calls: int = 0
    bytes: int = 0
    """Size of the full gathered or reduced data. In an all-gather or reduce-scatter, a rank sends
    and receives about this many bytes. In an all-reduce, about twice as many."""
    blocked_s: float = 0.0
    """Time that the main thread of this rank waited for other ranks and the network."""


class CommunicationMeter:
    """Counts the collectives of this rank, both DeepSpeed's and this package's.

    The meter wraps functions of torch.distributed. Call `install` before DeepSpeed imports them.
    The wrapper adds one or two microseconds per call.

    On the CPU, a collective blocks the caller in the call or in `wait` of its handle, so
    `blocked_s` is its full time. On a GPU, a collective is a kernel on a separate stream, so
    `blocked_s` is only the short time that the host waits.
    """

    def __init__(self) -> None:
        """Create the meter. Counting begins with `install`."""
        self.costs: dict[str, Cost] = {kind: Cost() for kind in dict.fromkeys(KINDS.values())}
        """Cost by kind since the last `reset`."""
        self.exchanges = 0
        """Number of calls since `install`. Ranks in the same collective have equal counts."""
        self._originals: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        """Wrap the functions in `KINDS` and begin to count."""
        for name, kind in KINDS.items():
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counted(self._originals[name], kind))

    def remove(self) -> None:
        """Restore the functions of torch.distributed."""
        for name, original in self._originals.items():
            setattr(dist, name, original)
        self._originals = {}

    def reset(self) -> None:
        """Reset the counts to zero."""
        for cost in self.costs.values():
            cost.calls, cost.bytes, cost.blocked_s = 0, 0, 0.0

    def metrics(self) -> dict[str, float]:
        """Return totals since the last `reset`: seconds by kind and in total, calls, gigabytes."""
        costs = self.costs.values()
        seconds = {f"communication/{kind}_s": cost.blocked_s for kind, cost in self.costs.items()}
        return seconds | {
            "communication/calls_per_step": float(sum(cost.calls for cost in costs)),
            "communication/gigabytes_per_step": sum(cost.bytes for cost in costs) / 1e9,
            "blocked_s": sum(cost.blocked_s for cost in costs),
        }

    def _counted(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            cost = self.costs[kind]
            cost.calls += 1
            self.exchanges += 1
            cost.bytes += max(map(_size, (*arguments, *named.values())), default=0)
            began = time.perf_counter()
            try:
                work = function(*arguments, **named)
            finally:
                cost.blocked_s += time.perf_counter() - began
            return work if work is None else _TimedWork(work, cost)

        return call


class _TimedWork:
    """Handle of an asynchronous collective that measures the time in `wait`."""

    def __init__(self, work: Any, cost: Cost) -> None:
        self._work, self._cost = work, cost

    def wait(self, *arguments: Any, **named: Any) -> Any:
        """Call `wait` of the original handle."""
        began = time.perf_counter()
        try:
            return self._work.wait(*arguments, **named)
        finally:
            self._cost.blocked_s += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _size(argument: Any) -> int:
    """Return the size of a tensor or a list of tensors, in bytes; 0 for other arguments."""
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, list):
        return sum(map(_size, argument))
    return 0
