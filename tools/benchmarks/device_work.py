"""Measure the work of GPU and host in a step from a trace of torch's profiler.

The trace holds only CUDA calls and kernels. Recording torch's operations would take the host longer
than the step itself.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
)
"""CUDA calls that wait for the device."""
_ALLOCATIONS = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost", "cuMemCreate")
_LAUNCH_LIMIT_US = 100.0
"""Duration above which a launch must have waited for space in the device's queue."""
Event = dict[str, Any]


def device_work(step: Callable[[], None]) -> dict[str, Any]:
    """Profile one step on a CUDA device; see `summary` for the figures.

    An empty trace is recorded first to count the waits of the profiler itself.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        idle, _ = _traced(lambda: None, Path(folder) / "idle.json")
        events, seconds = _traced(step, Path(folder) / "step.json")
    return summary(events, seconds, profilers_waits=sum(map(_is_wait, idle)))


def _traced(step: Callable[[], None], file: Path) -> tuple[list[Event], float]:
    """Trace a call. Returns its complete events, and the seconds until it returned."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
    profiler.export_chrome_trace(str(file))
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"], seconds


def summary(events: Sequence[Event], seconds: float, profilers_waits: int) -> dict[str, Any]:
    """Figures of a trace.

    Args:
        events: complete events in the format of Chrome's tracing, times in microseconds.
        seconds: wall time from the call of the step to its return.
        profilers_waits: number of waits at the end that belong to the profiler.

    Returns:
        `kernel_s` is the sum over kernels, and `busy_s` the time in which the device did anything.
        `host_s` is `seconds` without waits and without launches that waited for room in the queue.
        `waits` and `allocations` count CUDA calls by name. `kernels`, `launches`, `graph_launches`
        and `copies` are counts.
    """
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    waits = sorted(filter(_is_wait, calls), key=lambda event: event["ts"])
    waits = waits[: len(waits) - profilers_waits]
    names = [event["name"] for event in calls]
    launches = [event for event in calls if "LaunchKernel" in event["name"]]
    launches += [event for event in calls if "LaunchCooperativeKernel" in event["name"]]
    queued_us = sum(max(0.0, event["dur"] - _LAUNCH_LIMIT_US) for event in launches)
    waited_us = sum(event["dur"] for event in waits)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    return {
        "kernel_s": sum(event["dur"] for event in kernels) / 1e6,
        "busy_s": _covered_us([*kernels, *copies]) / 1e6,
        "host_s": max(0.0, seconds - (waited_us + queued_us) / 1e6),
        "kernels": len(kernels),
        "launches": len(launches),
        "graph_launches": names.count("cudaGraphLaunch"),
        "copies": len(copies),
        "waits": dict(Counter(event["name"] for event in waits)),
        "allocations": dict(Counter(name for name in names if name in _ALLOCATIONS)),
    }


def _is_wait(event: Event) -> bool:
    return event.get("name") in WAITS and event.get("cat") in ("cuda_runtime", "cuda_driver")


def _covered_us(events: Sequence[Event]) -> float:
    """Microseconds covered by the events. Overlaps count once."""
    covered, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def waiting_places(step: Callable[[], None]) -> dict[str, int]:
    """Count the places in the code where torch makes the host wait in one step.

    A place is the innermost line of this project or of DeepSpeed on the stack. Calls to
    `torch.cuda.synchronize` are missing, because torch emits no warning for them.
    """
    places: Counter[str] = Counter()

    def note(*arguments: Any, **keywords: Any) -> None:
        places[_place(traceback.extract_stack())] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return dict(places.most_common())


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    for frame in reversed(stack):
        for package in ("blip_scale", "tools", "deepspeed"):
            _, separator, rest = frame.filename.rpartition(f"/{package}/")
            if separator and not rest.endswith("device_work.py"):
                return f"{package}/{rest}:{frame.lineno} {frame.name}"
    return "elsewhere"


def gpu_memory() -> dict[str, float]:
    """Peak memory in GiB since the last reset; empty on a CPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
