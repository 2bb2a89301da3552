"""Every available attention kernel against SDPA in fp32: outputs, gradients and dropout.

SDPA itself runs on the CPU. The kernels for packed sequences need a GPU (`-m gpu`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip_scale.model import kernels
from blip_scale.model.attention import AttentionLayout, Segments, attention, dense_segments
from blip_scale.model.kernels import Backend, PackedLengths, packed_attention

HEADS, CHANNELS = 12, 64
CAPTIONS = [12, 7, 30, 3, 15, 9, 1, 22]
P = 0.1
WITH_DROPOUT = ("sdpa", "torch_flash", "flash_attn_2")


def on_gpu(backend: Backend) -> pytest.param:  # type: ignore[valid-type]
    """A kernel on a GPU, skipped without one."""
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    marks = [pytest.mark.gpu, without]
    return pytest.param(backend, "cuda", marks=marks, id=f"{backend}-cuda")


PLACES = [
    pytest.param("sdpa", "cpu", id="sdpa-cpu"),
    *(on_gpu(backend) for backend in ("sdpa", "torch_flash", "flash_attn_4", "flash_attn_2")),
]
DROPPING = [place for place in PLACES if place.values[0] in WITH_DROPOUT]


def layout_of(form: str, device: str) -> tuple[AttentionLayout, int, int]:
    """A layout of the network, and its numbers of query tokens and key tokens."""
    captions = Segments.from_lengths(CAPTIONS, device)
    images = dense_segments(len(CAPTIONS), 197, torch.device(device))
    tokens, image_tokens = sum(CAPTIONS), 197 * len(CAPTIONS)
    if form == "vision":
        return AttentionLayout(images, images), image_tokens, image_tokens
    if form == "cross":
        looking = Segments.from_lengths([4 * length for length in CAPTIONS], device)
        return AttentionLayout(looking, images), 4 * tokens, image_tokens
    return AttentionLayout(captions, captions, causal=form == "decoder"), tokens, tokens


def run(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, p: float = 0.0
) -> Tensor:
    """Run one kernel, whichever `choose_kernel` would choose."""
    if backend == "sdpa":
        return attention(q, k, v, layout, dropout_p=p, kernel="sdpa")
    queries, keys = layout.queries, layout.keys
    lengths = PackedLengths(queries.offsets, keys.offsets, queries.max_length, keys.max_length)
    return packed_attention(backend, q, k, v, lengths, p, layout.causal)


def skip_if_missing(backend: Backend) -> None:
    reason = None if backend == "sdpa" else kernels._missing(backend)
    if reason is not None:
        pytest.skip(reason)


def drawn(device: str, *tokens: int, seed: int = 0) -> list[Tensor]:
    """Random bf16 tensors [T, H, C] with gradients, one for each number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for count in tokens:
        values = torch.randn(count, HEADS, CHANNELS, generator=generator)
        tensors.append(values.to(device, torch.bfloat16).requires_grad_())
    return tensors


@pytest.mark.parametrize("form", ["vision", "encoder", "decoder", "cross"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_outputs_and_gradients_are_those_of_sdpa_in_fp32(
    backend: Backend, device: str, form: str
) -> None:
    skip_if_missing(backend)
    layout, queries, keys = layout_of(form, device)
    inputs = drawn(device, queries, keys, keys)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out = run(backend, *inputs, layout)
    expected = attention(*exact, layout, kernel="sdpa")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    weights = weights.to(torch.bfloat16).float()
    (out.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, x_exact in zip(inputs, exact, strict=True):
        assert x.grad is not None and x_exact.grad is not None
        error = (x.grad.float() - x_exact.grad).norm() / x_exact.grad.norm()
        assert error < 0.01


@pytest.mark.parametrize(("backend", "device"), DROPPING)
def test_dropout_drops_single_weights_and_scales_the_others(backend: Backend, device: str) -> None:
    """With equal scores and the identity as values, the output is the matrix of the weights."""
    skip_if_missing(backend)
    sequences, length = 64, CHANNELS
    segments = dense_segments(sequences, length, torch.device(device))
    layout = AttentionLayout(segments, segments)
    q = torch.zeros(sequences * length, HEADS, CHANNELS, device=device, dtype=torch.bfloat16)
    identity = torch.eye(CHANNELS, device=device, dtype=torch.bfloat16)
    v = identity.repeat(sequences, 1)[:, None].expand(-1, HEADS, -1).contiguous()
    torch.manual_seed(7)
    weights = run(backend, q, q, v, layout, P).float()
    dropped = weights == 0
    count = dropped.numel()
    deviation = (P * (1 - P) / count) ** 0.5
    assert abs(dropped.float().mean().item() - P) < 5 * deviation + 0.002  # p in steps of 1 / 256
    kept = weights[~dropped]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / length / (1 - P)), rtol=0.01, atol=0)
    # Rows, columns, heads and sequences all drop the share P, and no two draw the same mask.
    cells = dropped.float().unflatten(0, (sequences, length))
    for axis in range(4):
        others = [other for other in range(4) if other != axis]
        shares = cells.mean(dim=others)
        spread = (P * (1 - P) * len(shares) / count) ** 0.5
        assert (shares - P).abs().max() < 6 * spread + 0.002
    assert not torch.equal(cells[0], cells[1]) and not torch.equal(cells[:, :, 0], cells[:, :, 1])


@pytest.mark.parametrize("form", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize(("backend", "device"), DROPPING)
def test_dropout_keeps_the_mean(backend: Backend, device: str, form: str) -> None:
    """The mean of many draws is the output without dropout, within its statistical error."""
    skip_if_missing(backend)
    layout, queries, keys = layout_of(form, device)
    q, k, v = drawn(device, queries, keys, keys)
    expected = attention(q.float(), k.float(), v.float(), layout, kernel="sdpa")
    torch.manual_seed(11)
    draws = []
    with torch.no_grad():
        for _ in range(100):
            draws.append(run(backend, q, k, v, layout, P).float())
    stacked = torch.stack(draws)
    assert not torch.equal(stacked[0], stacked[1])
    deviation = stacked.std(dim=0) / len(draws) ** 0.5 + 0.004  # and the rounding of bf16
    scores = (stacked.mean(dim=0) - expected) / deviation
    assert scores.abs().mean() < 1.0 and scores.mean().abs() < 0.02


@pytest.mark.parametrize("form", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize(("backend", "device"), DROPPING)
def test_backward_drops_what_forward_dropped(backend: Backend, device: str, form: str) -> None:
    """The output is linear in the values, so <out, g> = <v, gradient of v> for the same mask."""
    skip_if_missing(backend)
    layout, queries, keys = layout_of(form, device)
    q, k, v = drawn(device, queries, keys, keys)
    (g,) = drawn(device, queries, seed=5)
    torch.manual_seed(13)
    out = run(backend, q, k, v, layout, 0.5)
    gradients = torch.autograd.grad(out, (q, k, v), g.detach())
    products = (out.float() * g.float()).sum(), (v.float() * gradients[2].float()).sum()
    scale = out.float().norm() * g.float().norm()
    assert (products[0] - products[1]).abs() < 1e-3 * scale
    assert gradients[0].abs().sum() > 0 and gradients[1].abs().sum() > 0
    torch.manual_seed(13)
    assert torch.equal(out, run(backend, q, k, v, layout, 0.5)), "one seed, one mask"
