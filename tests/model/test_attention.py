"""Packed attention against dense masked attention, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip_scale.model.attention import (
    AttentionLayout,
    Segments,
    attention,
    dense_segments,
)
from blip_scale.model.packing import cut_into_chunks

HEADS, CHANNELS = 3, 8
CPU = torch.device("cpu")
TEXT = [5, 1, 7, 3]
FORMS = ["encoder", "equal", "causal", "cross", "cross_ragged", "cross_grouped"]


def layout_of(form: str, device: str = "cpu") -> tuple[AttentionLayout, Tensor]:
    """A layout, and its dense mask [Tq, Tk] over all packed tokens."""
    queries = Segments.from_lengths([4] * 4 if form == "equal" else TEXT, device)
    keys = queries
    if form == "cross":
        keys = dense_segments(4, 6, torch.device(device))
    elif form == "cross_ragged":
        keys = Segments.from_lengths([2, 9, 1, 4], device)
    query_sequence = queries.sequence_of(int(queries.offsets[-1]))
    if form == "cross_grouped":  # rows of 16 tokens look at images 2, 0, 2, 1, ...; image 3 at none
        keys = dense_segments(4, 6, torch.device(device))
        query_sequence = torch.tensor(
            [2, 0, 2, 1, 1, 0, 2, 2, 0, 1, 2, 0, 0, 1, 2, 2], device=device
        )
        counts = query_sequence.bincount(minlength=4)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        queries = Segments(offsets, int(counts.max()), query_sequence.argsort(stable=True))
    key_sequence = keys.sequence_of(int(keys.offsets[-1]))
    mask = query_sequence[:, None] == key_sequence[None, :]
    if form == "causal":
        places = torch.arange(len(query_sequence), device=device)
        mask &= places[:, None] >= places[None, :]
    return AttentionLayout(queries, keys, causal=form == "causal"), mask


def inputs(mask: Tensor, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (mask.shape[0], mask.shape[1], mask.shape[1])
    drawn = [torch.randn(n, HEADS, CHANNELS, generator=generator) for n in lengths]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("qhc,khc->hqk", q, k) / CHANNELS**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khc->qhc", weights, v)


@pytest.mark.parametrize("form", FORMS)
def test_packed_equals_dense_masked(form: str) -> None:
    layout, mask = layout_of(form)
    ours, reference = inputs(mask, torch.float32, "cpu"), inputs(mask, torch.float32, "cpu")
    out, expected = attention(*ours, layout), dense(*reference, mask)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_equals_dense_masked_but_for_rounding(form: str) -> None:
    layout, mask = layout_of(form)
    ours, reference = inputs(mask, torch.bfloat16, "cpu"), inputs(mask, torch.bfloat16, "cpu")
    out = attention(*ours, layout)
    expected = dense(*(x.float() for x in reference), mask)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.02)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=0.06, rtol=0.03)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("groups", [[2, 0, 2, 1, 1, 0, 2, 2, 0, 1, 2, 0, 0, 1], [0] * 9, [3, 2, 1]])
def test_chunks_of_groups_equal_dense_masked(groups: list[int], ragged: bool) -> None:
    """Layouts of SDPA on a GPU. The longest group is unknown, and image 3 may have no row."""
    keys = Segments.from_lengths([2, 9, 1, 4]) if ragged else dense_segments(4, 6, CPU)
    row_images = torch.tensor(groups)
    layout = cut_into_chunks(
        row_images.bincount(minlength=4).int(), row_images.argsort(stable=True), keys
    )
    key_tokens = int(keys.offsets[-1])
    mask = row_images[:, None] == keys.sequence_of(key_tokens)[None, :]
    ours, reference = inputs(mask, torch.float32, "cpu"), inputs(mask, torch.float32, "cpu")
    out, expected = (
        attention(*ours, layout.padded(len(groups), key_tokens)),
        dense(*reference, mask),
    )
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attention(*ours, layout), expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-5)


def test_strided_views_of_a_fused_projection() -> None:
    layout, mask = layout_of("encoder")
    qkv = torch.randn(len(mask), 3, HEADS, CHANNELS)
    q, k, v = qkv.unbind(1)
    torch.testing.assert_close(attention(q, k, v, layout), dense(q, k, v, mask))


def test_a_larger_bound_than_the_longest_sequence_changes_nothing() -> None:
    layout, mask = layout_of("encoder")
    loose = Segments(layout.queries.offsets, 11)
    q, k, v = inputs(mask, torch.float32, "cpu")
    torch.testing.assert_close(
        attention(q, k, v, AttentionLayout(loose, loose)), attention(q, k, v, layout)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_and_scales(dtype: torch.dtype) -> None:
    segments = dense_segments(1, 400, torch.device("cpu"))
    q = k = torch.zeros(400, 1, CHANNELS, dtype=dtype)
    out = attention(q, k, torch.ones_like(q), AttentionLayout(segments, segments), dropout_p=0.25)
    assert out.unique().numel() > 10
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)


def test_causal_refuses_two_segments() -> None:
    queries, keys = Segments.from_lengths([3]), Segments.from_lengths([3])
    with pytest.raises(ValueError, match="same segments"):
        AttentionLayout(queries, keys, causal=True)


def test_sdpa_compiles_nothing_for_a_new_length() -> None:
    assert not torch.backends.cuda.cudnn_sdp_enabled()
