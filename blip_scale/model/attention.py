"""Attention over packed sequences: one function over the kernels of `kernels`, and the layouts.

Sequences of different lengths lie one after another in one tensor, so no linear layer ever computes
on a pad. Only SDPA, which knows no packed layout, gets its inputs padded, and its output is packed
again at once.

Shapes: T packed tokens, S sequences, L longest sequence, H heads, C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.model.dropout import dropout
from blip_scale.model.kernels import Backend, Kernel, PackedLengths, choose_kernel, packed_attention

# SDPA would take cuDNN's kernel on new GPUs, which is compiled for every new shape: 0.17 s on an
# H200, and captions have other lengths in every batch. The others take as long as it does after.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Segments:
    """Where the sequences lie in a packed tensor. Index tensors are made on first use and kept."""

    offsets: Tensor
    """[S+1] int32: sequence s takes the places offsets[s] to offsets[s+1]; offsets[-1] is T."""
    max_length: int
    """At least the longest sequence; a plain int, so that no kernel launch waits for the device."""
    order: Tensor | None = None
    """[T] int64: the row of the tensor that holds each place. None: the rows are in order."""

    @staticmethod
    def from_lengths(lengths: list[int], device: torch.device | str = "cpu") -> Segments:
        """Segments of the given lengths."""
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Segments(offsets.to(device), max(lengths, default=0))

    @property
    def count(self) -> int:
        """Number of sequences S."""
        return self.offsets.numel() - 1

    @cached_property
    def lengths(self) -> Tensor:
        """[S] int32."""
        return self.offsets[1:] - self.offsets[:-1]

    @cached_property
    def valid(self) -> Tensor:
        """[S, L] bool: True where the padded layout holds a token."""
        places = torch.arange(self.max_length, device=self.offsets.device)
        return places < self.lengths[:, None]

    def is_dense(self, tokens: int) -> bool:
        """Whether all sequences are max_length long and in order: then padding is a mere view."""
        return self.order is None and tokens == self.count * self.max_length

    def sequence_of(self, tokens: int) -> Tensor:
        """[T] int64: the sequence of each place. The caller knows T (`tokens`) without a sync."""
        return self._kept("_sequence_of", tokens)

    def positions(self, tokens: int) -> Tensor:
        """[T] int64: each place counted from the start of its sequence."""
        return self._kept("_positions", tokens)

    def padded_rows(self, tokens: int) -> Tensor:
        """[T] int64: where each row of the tensor goes in the flattened padded layout [S * L]."""
        return self._kept("_padded_rows", tokens)

    def pad(self, x_THC: Tensor) -> Tensor:
        """[T, H, C] to [S, L, H, C], zeros in the pads; a view when there are none."""
        tokens, *rest = x_THC.shape
        if self.is_dense(tokens):
            return x_THC.unflatten(0, (self.count, self.max_length))
        padded = x_THC.new_zeros(self.count * self.max_length, *rest)
        padded.index_copy_(0, self.padded_rows(tokens), x_THC)
        return padded.unflatten(0, (self.count, self.max_length))

    def unpad(self, x_SLHC: Tensor, tokens: int) -> Tensor:
        """The way back: [S, L, H, C] to [T, H, C]."""
        flat = x_SLHC.flatten(0, 1)
        return flat if self.is_dense(tokens) else flat.index_select(0, self.padded_rows(tokens))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same segments on another device."""
        order = None if self.order is None else self.order.to(device, non_blocking=non_blocking)
        return Segments(self.offsets.to(device, non_blocking=non_blocking), self.max_length, order)

    def _kept(self, name: str, tokens: int) -> Tensor:
        if name not in self.__dict__:
            self.__dict__[name] = getattr(self, "_make" + name)(tokens)
        return self.__dict__[name]

    def _make_sequence_of(self, tokens: int) -> Tensor:
        sequences = torch.arange(self.count, device=self.offsets.device)
        return sequences.repeat_interleave(self.lengths, output_size=tokens)

    def _make_positions(self, tokens: int) -> Tensor:
        starts = self.offsets.long().index_select(0, self.sequence_of(tokens))
        return torch.arange(tokens, device=starts.device) - starts

    def _make_padded_rows(self, tokens: int) -> Tensor:
        rows = self.sequence_of(tokens) * self.max_length + self.positions(tokens)
        if self.order is None:
            return rows
        return torch.empty_like(rows).scatter_(0, self.order, rows)


@lru_cache(maxsize=64)
def dense_segments(count: int, length: int, device: torch.device) -> Segments:
    """Segments of `count` sequences of one `length`, such as the tokens of a batch of images."""
    with torch.inference_mode(False):  # kept for later steps, whose backward may save the offsets
        stop = count * length + 1
        offsets = torch.arange(0, stop, length, dtype=torch.int32, device=device)
    return Segments(offsets, length)


@dataclass(frozen=True)
class AttentionLayout:
    """Which tokens may see which: query sequence s sees key sequence s, wholly or causally."""

    queries: Segments
    keys: Segments
    causal: bool = False
    """Each token sees itself and those before it; queries and keys must be the same segments."""

    def __post_init__(self) -> None:
        if self.causal and self.queries is not self.keys:
            raise ValueError("causal attention is self-attention: pass the same segments twice")

    @cached_property
    def key_mask(self) -> Tensor:
        """[S, 1, 1, L] bool for SDPA: False at pads."""
        return self.keys.valid[:, None, None, :]


def attention(
    q_THC: Tensor,
    k_THC: Tensor,
    v_THC: Tensor,
    layout: AttentionLayout,
    dropout_p: float = 0.0,
    kernel: Kernel = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v within each sequence, with dropout on the probabilities.

    Args:
        q_THC: [T of the queries, H, C], any floating type; the last dimension contiguous.
        k_THC, v_THC: [T of the keys, H, C]. Strided views (of a fused projection) are welcome.
        layout: who sees whom. Every key sequence holds at least one token.
        dropout_p: its probability; give 0 in evaluation.
        kernel: see `choose_kernel`.

    Returns:
        [T of the queries, H, C], rows in the order of q_THC.
    """
    choice = choose_kernel(kernel, q_THC.device, q_THC.dtype, q_THC.shape[-1])
    backend = choice.backend(dropout_p)
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
    queries, keys = layout.queries, layout.keys
    # Pads come last, so a causal token never sees one: no mask is needed beside the causal one.
    mask = None if layout.causal or keys.is_dense(len(k_THC)) else layout.key_mask
    q_SHLC = queries.pad(q_THC).transpose(1, 2)
    k_SHLC, v_SHLC = keys.pad(k_THC).transpose(1, 2), keys.pad(v_THC).transpose(1, 2)
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


def _is_slow(q: Tensor, p: float) -> bool:
    """Whether SDPA is slower than plain products: on a CPU in bf16, forward and backward, 2 to 4
    times, and with dropout, for which it takes products itself, in fp32, and torch's dropout."""
    return q.device.type == "cpu" and (q.dtype == torch.bfloat16 or p > 0)
