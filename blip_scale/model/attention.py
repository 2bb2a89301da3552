"""Attention over packed sequences: layouts, and one function for all kernels of `kernels`.

Sequences of different lengths are concatenated in one tensor, so no linear layer computes on pads.
SDPA takes no packed layout, so its inputs are padded here and its output is packed again.

Shapes: T packed tokens, S sequences, L longest sequence, H heads, C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.model.dropout import dropout
from blip_scale.model.kernels import (
    Backend,
    Kernel,
    PackedLengths,
    chosen_backend,
    packed_attention,
)

# On new GPUs SDPA would choose cuDNN's kernel, which is compiled for every new shape (0.17 s on an
# H200). Each batch of captions has new lengths. Once compiled, this kernel is no faster.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Segments:
    """Boundaries of the sequences in a packed tensor."""

    offsets: Tensor
    """Sequence s has the places offsets[s] to offsets[s+1], and offsets[-1] is T. [S+1] int32."""
    max_length: int
    """Upper bound of the lengths. It is an int, so that no kernel launch waits for the device."""
    order: Tensor | None = None
    """Row of the tensor that holds each place, [T] int64. None: place and row are equal."""
    rows: Tensor | None = None
    """Index of each row of the tensor in the flattened padded layout [S * L], [T] int64. None: each
    call of `pad` and `unpad` computes it; see `padded`."""

    @staticmethod
    def from_lengths(lengths: list[int], device: torch.device | str = "cpu") -> Segments:
        """Create segments of these lengths."""
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Segments(offsets.to(device), max(lengths, default=0))

    @property
    def count(self) -> int:
        """Number of sequences S."""
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Length of each sequence, [S] int32."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def valid(self) -> Tensor:
        """Whether each element of the padded layout is a token, [S, L] bool."""
        places = torch.arange(self.max_length, device=self.offsets.device)
        return places < self.lengths[:, None]

    def is_dense(self, tokens: int) -> bool:
        """Whether all sequences are in order and max_length long, so that padding is a view."""
        in_order = self.order is None and self.rows is None
        return in_order and tokens == self.count * self.max_length

    def sequence_of(self, tokens: int) -> Tensor:
        """Return the sequence of each place, [T] int64.

        `tokens` is T. The host would have to wait for the device to read it from `offsets`.
        """
        sequences = torch.arange(self.count, device=self.offsets.device)
        return sequences.repeat_interleave(self.lengths, output_size=tokens)

    def positions(self, sequences_T: Tensor) -> Tensor:
        """Return the position in its sequence of each place, [T] int64. See `sequence_of`."""
        starts_T = self.offsets.long().index_select(0, sequences_T)
        return torch.arange(len(sequences_T), device=starts_T.device) - starts_T

    def padded(self, tokens: int) -> Segments:
        """Compute `rows` once, for layers that pad and unpad many tensors."""
        return self if self.is_dense(tokens) else replace(self, rows=self.padded_rows(tokens))

    def padded_rows(self, tokens: int) -> Tensor:
        """Return `rows`, [T] int64; compute them if necessary."""
        if self.rows is not None:
            return self.rows
        sequences = self.sequence_of(tokens)
        rows = sequences * self.max_length + self.positions(sequences)
        if self.order is None:
            return rows
        return torch.empty_like(rows).scatter_(0, self.order, rows)

    def pad(self, x_THC: Tensor) -> Tensor:
        """Pad [T, H, C] with zeros to [S, L, H, C]. Return a view if there are no pads."""
        tokens, *rest = x_THC.shape
        if self.is_dense(tokens):
            return x_THC.unflatten(0, (self.count, self.max_length))
        padded = x_THC.new_zeros(self.count * self.max_length, *rest)
        padded.index_copy_(0, self.padded_rows(tokens), x_THC)
        return padded.unflatten(0, (self.count, self.max_length))

    def unpad(self, x_SLHC: Tensor, tokens: int) -> Tensor:
        """Pack [S, L, H, C] to [T, H, C]. This is the inverse of `pad`."""
        flat = x_SLHC.flatten(0, 1)
        return flat if self.is_dense(tokens) else flat.index_select(0, self.padded_rows(tokens))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """Copy the segments to another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        offsets = self.offsets.to(device, non_blocking=non_blocking)
        return Segments(offsets, self.max_length, moved(self.order), moved(self.rows))


@lru_cache(maxsize=64)
def dense_segments(count: int, length: int, device: torch.device) -> Segments:
    """Create segments of `count` sequences of one `length`, such as a batch of images."""
    with torch.inference_mode(False):  # cached: a later backward may need to save the offsets
        stop = count * length + 1
        offsets = torch.arange(0, stop, length, dtype=torch.int32, device=device)
    return Segments(offsets, length)


@dataclass(frozen=True)
class AttentionLayout:
    """Which tokens attend to which: query sequence s to key sequence s, fully or causally."""

    queries: Segments
    keys: Segments
    causal: bool = False
    """Each token attends to itself and those before it. Requires `queries is keys`."""
    contexts: Tensor | None = None
    """Key sequence that each query sequence attends to, [S] int64, for SDPA only. None: key
    sequence s for query sequence s."""
    key_mask: Tensor | None = None
    """False at the pads of the keys that each query sequence attends to, [S, 1, 1, L] bool, for
    SDPA only. None: each call computes it if keys have pads; see `padded`."""

    def __post_init__(self) -> None:
        if self.causal and self.queries is not self.keys:
            raise ValueError("causal attention is self-attention: pass the same segments twice")

    def padded(self, query_tokens: int, key_tokens: int) -> AttentionLayout:
        """Compute all index tensors that SDPA needs once, for many calls."""
        queries = self.queries.padded(query_tokens)
        keys = queries if self.keys is self.queries else self.keys.padded(key_tokens)
        return replace(self, queries=queries, keys=keys, key_mask=self.mask(key_tokens))

    def mask(self, key_tokens: int) -> Tensor | None:
        """Return the mask of the keys, [S, 1, 1, L] bool; see `key_mask`. None: no mask is needed.

        Causal attention needs none: pads come last, so no token attends to one.
        """
        if self.key_mask is not None or self.causal or self.keys.is_dense(key_tokens):
            return self.key_mask
        valid = self.keys.valid
        if self.contexts is not None:
            valid = valid.index_select(0, self.contexts)
        return valid[:, None, None, :]


def attention(
    q_THC: Tensor,
    k_THC: Tensor,
    v_THC: Tensor,
    layout: AttentionLayout,
    dropout_p: float = 0.0,
    kernel: Kernel = "auto",
) -> Tensor:
    """Compute softmax(q k^T / sqrt(C)) v in each sequence, with dropout on the probabilities.

    Args:
        q_THC: [T of the queries, H, C], any floating type. The last dimension is contiguous.
        k_THC: [T of the keys, H, C]. Strided views of a fused projection are allowed.
        v_THC: [T of the keys, H, C], like k_THC.
        layout: which tokens attend to which. Every key sequence holds at least one token.
        dropout_p: probability of dropping a weight; 0 in evaluation.
        kernel: see `choose_kernel`.

    Returns:
        [T of the queries, H, C], rows in the order of q_THC.
    """
    backend = chosen_backend(
        kernel, q_THC.device, q_THC.dtype, q_THC.shape[-1], has_dropout=dropout_p > 0
    )
    if backend == "sdpa":
        return _sdpa(q_THC, k_THC, v_THC, layout, dropout_p)
    return _packed(backend, q_THC, k_THC, v_THC, layout, dropout_p)


def _packed(
    backend: Backend,
    q_THC: Tensor,
    k_THC: Tensor,
    v_THC: Tensor,
    layout: AttentionLayout,
    dropout_p: float,
) -> Tensor:
    queries, keys = layout.queries, layout.keys
    if queries.order is not None:
        q_THC = q_THC.index_select(0, queries.order)
    if keys.order is not None:
        k_THC, v_THC = k_THC.index_select(0, keys.order), v_THC.index_select(0, keys.order)
    lengths = PackedLengths(queries.offsets, keys.offsets, queries.max_length, keys.max_length)
    out_THC = packed_attention(backend, q_THC, k_THC, v_THC, lengths, dropout_p, layout.causal)
    if queries.order is None:
        return out_THC
    return torch.empty_like(out_THC).index_copy(0, queries.order, out_THC)


def _sdpa(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, layout: AttentionLayout, p: float) -> Tensor:
    queries, mask = layout.queries, layout.mask(len(k_THC))
    q_SHLC = queries.pad(q_THC).transpose(1, 2)
    k_SHLC, v_SHLC = (_seen(layout, x).transpose(1, 2) for x in (k_THC, v_THC))
    if not layout.causal and _is_slow(q_SHLC, p):
        scores = (q_SHLC * q_SHLC.shape[-1] ** -0.5) @ k_SHLC.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out_SHLC = dropout(scores.softmax(dim=-1), p) @ v_SHLC
    else:
        out_SHLC = F.scaled_dot_product_attention(
            q_SHLC, k_SHLC, v_SHLC, attn_mask=mask, dropout_p=p, is_causal=layout.causal
        )
    return queries.unpad(out_SHLC.transpose(1, 2), len(q_THC))


def _seen(layout: AttentionLayout, x_THC: Tensor) -> Tensor:
    """Pad the keys or values that each query sequence attends to, [S, L, H, C]."""
    x_SLHC = layout.keys.pad(x_THC)
    return x_SLHC if layout.contexts is None else x_SLHC.index_select(0, layout.contexts)


def _is_slow(q: Tensor, p: float) -> bool:
    """Whether SDPA is slower than two matrix products and a softmax.

    On a CPU, SDPA is 2 to 4 times slower in bf16, forward and backward. With dropout, SDPA itself
    computes two products, in fp32 and with torch's slow dropout.
    """
    return q.device.type == "cpu" and (q.dtype == torch.bfloat16 or p > 0)
