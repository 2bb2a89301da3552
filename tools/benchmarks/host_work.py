"""Count the host's work in a step, for `tools/benchmark.py step`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def host_work(step: Callable[[], None]) -> dict[str, int]:
    """Count the operations on tensors and the calls of Python functions in a step.

    Views and empty tensors are not counted. On a GPU, an operation launches one or a few kernels.
    """
    operations = calls = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal operations
            name = func.overloadpacket.__name__
            operations += not func.is_view and "empty" not in name and name != "detach"
            return func(*args, **(kwargs or {}))

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    with Counting():
        step()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {"operations": operations, "python_calls": calls}
