"""Measure attention kernels at the shapes of the step: the `attention` part of `gpu_report.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip_scale.model.attention import AttentionLayout, Segments, attention, dense_segments
from blip_scale.model.kernels import Backend, PackedLengths, packed_attention
from tools.benchmarks.gpu_rows import Rows

DROPOUT = 0.1
_SDPA = {
    "SDPA, math": SDPBackend.MATH,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
_WITHOUT_DROPOUT = ("flash_attn_4", "torch varlen_attn")
_HEAD_START = 10_000_000
"""Cycles (about 5 ms) for which the device sleeps while the host launches the timed work."""
Function = Callable[[Tensor, Tensor, Tensor, AttentionLayout, float], Tensor]


@dataclass(frozen=True)
class Case:
    """Shape of one attention operation of the step."""

    name: str
    layout: AttentionLayout
    queries: int
    """Total number of tokens of the query sequences."""
    keys: int
    """Total number of tokens of the key sequences."""
    drops: bool
    """Whether it is trained with dropout."""


def cases(batch: int, image_tokens: int, device: torch.device) -> list[Case]:
    """Attention of the ViT, both kinds of self-attention of the text, and cross-attention.

    In cross-attention, four captions attend to each image.
    """
    generator = torch.Generator().manual_seed(1)
    draws = torch.empty(batch).log_normal_(mean=2.46, std=0.35, generator=generator)
    lengths = draws.round().clamp(4, 30).int().tolist()
    captions = Segments.from_lengths(lengths, device)
    looking = Segments.from_lengths([4 * length for length in lengths], device)
    images = dense_segments(batch, image_tokens, device)
    tokens, image_rows = sum(lengths), batch * image_tokens
    return [
        Case("ViT", AttentionLayout(images, images), image_rows, image_rows, False),
        Case("text", AttentionLayout(captions, captions), tokens, tokens, True),
        Case("text, causal", AttentionLayout(captions, captions, True), tokens, tokens, True),
        Case("cross", AttentionLayout(looking, images), 4 * tokens, image_rows, True),
    ]


def kernels() -> dict[str, Function]:
    """Kernels by name.

    They are the packed kernels of `blip_scale.model.kernels`, torch's varlen_attn, and the backends
    of SDPA on padded sequences, which `model.attention: sdpa` uses.
    """
    functions: dict[str, Function] = {"torch_flash": _packed("torch_flash")}
    functions["SDPA, torch's choice"] = _sdpa(None)
    for name, choice in _SDPA.items():
        functions[name] = _sdpa(choice)
    functions["torch varlen_attn"] = _varlen
    for backend in get_args(Backend):
        if backend != "sdpa":  # flash-attn-4 is last, because it compiles for each shape
            functions.setdefault(backend, _packed(backend))
    return functions


def _packed(backend: Backend) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, p: float) -> Tensor:
        queries, keys = layout.queries, layout.keys
        bounds = queries.max_length, keys.max_length
        lengths = PackedLengths(queries.offsets, keys.offsets, *bounds)
        return packed_attention(backend, q, k, v, lengths, p, layout.causal)

    return run


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, p: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if layout.causal:
        raise NotImplementedError("not tried with a causal mask")
    queries, keys = layout.queries, layout.keys
    bounds = queries.max_length, keys.max_length
    out = varlen_attn(q, k, v, queries.offsets, keys.offsets, *bounds)
    return out if isinstance(out, Tensor) else out[0]


def _sdpa(choice: SDPBackend | None) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, p: float) -> Tensor:
        with nullcontext() if choice is None else sdpa_kernel([choice]):
            return attention(q, k, v, layout, dropout_p=p, kernel="sdpa")

    return run


@dataclass(frozen=True)
class _Shape:
    """A case at one batch size, with its inputs and the result of SDPA in fp32."""

    batch: int
    case: Case
    inputs: list[Tensor]
    expected: Tensor


def run_attention(rows: Rows, device: torch.device, tiny: bool) -> None:
    """Measure the error against fp32 SDPA, and the time of forward and backward, of each kernel."""
    heads, channels, image_tokens = (2, 16, 10) if tiny else (12, 64, 197)
    shapes = []
    for batch in (2,) if tiny else (64, 256):
        for case in cases(batch, image_tokens, device):
            inputs = _drawn(case, heads, channels, device)
            q, k, v = (x.detach().float() for x in inputs)
            expected = attention(q, k, v, case.layout, kernel="sdpa")
            shapes.append(_Shape(batch, case, inputs, expected))
    for name, function in kernels().items():
        for shape in shapes:
            for p in (0.0, DROPOUT) if shape.case.drops else (0.0,):
                _add_row(rows, name, function, shape, p)


def _add_row(rows: Rows, name: str, function: Function, shape: _Shape, p: float) -> None:
    key = {"batch_size": shape.batch, "case": shape.case.name, "kernel": name, "dropout": p}
    if p and name in _WITHOUT_DROPOUT:
        rows.add(**key, error="has no dropout")
        return
    try:
        values = _measured(function, shape.inputs, shape.case.layout, p, shape.expected)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        values = {"error": text[:200]}
    rows.add(**key, **values)


def _drawn(case: Case, heads: int, channels: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    drawn = []
    for tokens in (case.queries, case.keys, case.keys):
        values = torch.randn(tokens, heads, channels, device=device, generator=generator)
        drawn.append(values.to(torch.bfloat16).requires_grad_())
    return drawn


def _measured(
    function: Function, inputs: list[Tensor], layout: AttentionLayout, p: float, expected: Tensor
) -> dict[str, Any]:
    q, k, v = inputs
    out = function(q, k, v, layout, p)
    gradient = torch.ones_like(out)

    def both() -> None:
        torch.autograd.grad(function(q, k, v, layout, p), inputs, gradient)

    values: dict[str, Any] = {"ms": milliseconds(both, q.device)}
    if not p:
        values["max_error"] = (out.float() - expected).abs().max().item()
    return values


def milliseconds(function: Callable[[], None], device: torch.device, rounds: int = 10) -> float:
    """Median time of a call after three warm-up calls. On a GPU, only device time is measured."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(_HEAD_START)
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            function()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)
