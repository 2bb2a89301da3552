"""train.py that counts the operations at which the host would wait for a GPU.

It runs on the CPU, but DeepSpeed takes its CUDA code paths. For each optimizer step,
waits_RANK.json in the output folder lists the places in the code where the host waits, by kind.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from blip_scale import train
from blip_scale.engine import loop
from blip_scale.model import packing

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "multinomial", "bincount"}
"""Operators that copy a value to the host, or whose output shape depends on a value."""

_steps: list[dict[str, list[str]]] = []
_counting = False
_main = threading.main_thread()
_QUIET = ("torch/", "deepspeed/utils", "train_counting_waits")
_ON_THE_HOST = "loading/micro_batches.py"
"""Not counted: it reads the offsets of captions before they are copied to the device."""


def note(kind: str) -> None:
    """Add the place of the caller to the current step."""
    if not _counting or threading.current_thread() is not _main:
        return
    place = ""
    for frame in traceback.extract_stack():
        if not any(part in frame.filename for part in _QUIET):
            place = f"{frame.filename}:{frame.lineno}"
    if _ON_THE_HOST not in place:
        _steps[-1].setdefault(kind, []).append(place)


class Reads(TorchDispatchMode):
    """Dispatch mode that records operators which read a value on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            note("read")
        return func(*args, **(kwargs or {}))


class Stream:
    """Stand-in for a CUDA stream."""

    def synchronize(self) -> None:
        note("synchronize")

    def wait_stream(self, other: Any) -> None:
        """Costs the host nothing."""

    def wait_event(self, event: Any) -> None:
        """Costs the host nothing."""

    def record_event(self, event: Any = None) -> Event:
        return Event()


class Event:
    """Stand-in for a CUDA event."""

    def __init__(self, **settings: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        """Costs the host nothing."""

    def wait(self, stream: Any = None) -> None:
        """Costs the host nothing."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note("synchronize")


def _noting(original: Callable[..., Any], kind: str, counts: Callable[..., bool]) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        if counts(*arguments, **named):
            note(kind)
        return original(*arguments, **named)

    return call


def _is_blocking_move(tensor: Any, *arguments: Any, **named: Any) -> bool:
    """Return True if these arguments make `Tensor.to` a blocking copy to a device."""
    places = [*arguments, named.get("device")]
    to_device = any(isinstance(place, (torch.device, str)) for place in places)
    return to_device and not named.get("non_blocking") and len(arguments) < 3


def take_branches_for_cuda() -> None:
    """Make DeepSpeed use streams and events on a CPU."""
    packing.reads_are_free = lambda device: False
    accelerator: Any = CPU_Accelerator
    accelerator.is_synchronized_device = lambda self: False
    accelerator.Stream = property(lambda self: Stream)
    accelerator.Event = property(lambda self: Event)
    accelerator.stream = lambda self, stream: contextlib.nullcontext()
    accelerator.current_stream = accelerator.default_stream = lambda self, device=None: Stream()
    accelerator.synchronize = lambda self, device=None: note("synchronize")
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None
    tensor.tolist = _noting(tensor.tolist, "read", lambda self: True)
    tensor.numpy = _noting(tensor.numpy, "read", lambda self, **settings: True)
    tensor.cpu = _noting(tensor.cpu, "read", lambda self: True)
    tensor.to = _noting(tensor.to, "pageable copy", _is_blocking_move)
    torch.tensor = _noting(
        torch.tensor, "pageable copy", lambda data, **settings: settings.get("device") is not None
    )


def counted_step(run: loop.Run, batches: Iterator[Any]) -> bool:
    """Run an optimizer step, and count its waits, except those of the loader."""
    global _counting

    def uncounted() -> Iterator[Any]:
        global _counting
        while True:
            _counting = False
            batch = next(batches)
            _counting = True
            yield batch

    _steps.append({})
    _counting = True
    try:
        with Reads():
            return _step(run, uncounted())
    finally:
        _counting = False
        file = Path(run.recipe.output_dir) / f"waits_{os.environ['RANK']}.json"
        file.write_text(json.dumps(_steps))


_step = loop.optimizer_step

if __name__ == "__main__":
    take_branches_for_cuda()
    loop.optimizer_step = counted_step
    train.command()
