"""Packed text, and the plan of a pass through the text stack: all index tensors, made once.

Static shapes: a text can be filled up to a fixed size. Its last sequences are then fillers. They go
through the layers and look at image 0, but nothing reads their output. Losses and gradients are
those of the text without them.

Shapes: T packed tokens, S sequences, I images, N image tokens, R rows that are read at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.model.attention import AttentionLayout, Segments, dense_segments

IGNORED = -100
"""Target that the LM loss ignores: tokens of a prompt, fillers."""
_ALIGNMENT = 8
"""Number of rows that sizes are multiples of: a matrix product on a GPU takes so many at once."""


@dataclass(frozen=True)
class Room:
    """Static size that texts are filled up to."""

    tokens: int
    """Tokens of text and fillers together."""
    fillers: int
    """Number of filler sequences."""

    @staticmethod
    def between(fewest: int, most: int, max_length: int) -> Room:
        """Room for every text of `fewest` to `most` tokens, fillers of 2 to `max_length` tokens."""
        fillers = math.ceil((most - fewest + _ALIGNMENT - 1) / (max_length - 2))
        tokens = math.ceil((most + 2 * fillers) / _ALIGNMENT) * _ALIGNMENT
        return Room(tokens, fillers)

    def fits(self, tokens: Tensor, max_length: int) -> Tensor:
        """Whether a text of `tokens` tokens leaves each filler 2 to `max_length` tokens.

        `tokens` is an integer scalar; the result is a bool scalar on its device.
        """
        rest = self.tokens - tokens
        return (rest >= 2 * self.fillers) & (rest <= max_length * self.fillers)

    def filler_ends(self, tokens: Tensor) -> Tensor:
        """[fillers] int32: the offsets at which the fillers after a text of `tokens` tokens end.

        `tokens` is an int32 scalar. The fillers share the remaining tokens evenly.
        """
        steps = torch.arange(1, self.fillers + 1, dtype=torch.int32, device=tokens.device)
        return tokens + (self.tokens - tokens) * steps // self.fillers


@dataclass(frozen=True)
class PackedText:
    """Token ids of several sequences, one after another, without pads."""

    token_ids: Tensor
    """[T] int64."""
    segments: Segments
    """Where the sequences lie in `token_ids`, fillers included."""
    fillers: int = 0
    """Number of last sequences that only fill the tensor up to a static size."""

    @staticmethod
    def from_lists(
        sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> PackedText:
        """Pack lists of token ids. Each list holds at least one."""
        ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
        lengths = [len(ids) for ids in sequences]
        return PackedText(ids.to(device), Segments.from_lengths(lengths, device))

    @property
    def count(self) -> int:
        """Number of sequences S without fillers."""
        return self.segments.count - self.fillers

    @property
    def lengths(self) -> Tensor:
        """[S] int32, without fillers."""
        return self.segments.lengths[: self.count]

    @property
    def first_rows(self) -> Tensor:
        """[S] int64: the place of each sequence's first token, without fillers."""
        return self.segments.offsets[: self.count].long()

    def with_first_token(self, token_id: int) -> PackedText:
        """The same text with every first token replaced ([CLS] by [ENC] or [DEC])."""
        ids = self.token_ids.index_fill(0, self.first_rows, token_id)
        return replace(self, token_ids=ids)

    def select(self, index: Tensor, room: Room | None = None) -> PackedText:
        """The sequences with these numbers, in this order.

        Args:
            index: [S'] int64; repeats are allowed.
            room: size to fill up to; `Room.fits` must hold for the chosen sequences. None: no
                fillers, and the host waits for the device once, to learn the new length.
        """
        lengths = self.lengths.index_select(0, index)
        starts = self.first_rows.index_select(0, index)
        return _gather(self.token_ids, starts, lengths, self.segments.max_length, room)

    def table(self, width: int) -> Tensor:
        """[S, width + 1] int64: row s holds sequence s, then zeros, and at its end the length.

        `width` is the length of the longest sequence, or more.
        """
        lengths = self.lengths
        places = torch.arange(width, device=lengths.device)
        rows = (self.first_rows[:, None] + places).clamp_(max=len(self.token_ids) - 1)
        ids = self.token_ids[rows].masked_fill_(places >= lengths[:, None], 0)
        return torch.cat([ids, lengths[:, None].long()], dim=1)

    def split_targets(self) -> tuple[PackedText, Tensor]:
        """Inputs and targets of next-token prediction.

        Inputs are all tokens but each sequence's last. Targets [T - S] int64 are the tokens that
        follow them, and `IGNORED` in fillers. Every sequence holds at least two tokens.
        """
        old = self.segments
        steps = torch.arange(old.count + 1, dtype=torch.int32, device=old.offsets.device)
        segments = Segments(old.offsets - steps, old.max_length - 1)
        kept = len(self.token_ids) - old.count
        sequences = segments.sequence_of(kept)
        rows = torch.arange(kept, device=old.offsets.device) + sequences
        text = PackedText(self.token_ids.index_select(0, rows), segments, self.fillers)
        targets = self.token_ids.index_select(0, rows + 1)
        if self.fillers:
            targets = targets.masked_fill(sequences >= self.count, IGNORED)
        return text, targets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedText:
        """The same text on another device."""
        ids = self.token_ids.to(device, non_blocking=non_blocking)
        return PackedText(ids, self.segments.to(device, non_blocking), self.fillers)


def select_from_table(table: Tensor, index: Tensor, room: Room | None) -> PackedText:
    """Like `PackedText.select`, from a table that `PackedText.table` made."""
    width = table.shape[1] - 1
    lengths = table[:, -1].index_select(0, index).int()
    return _gather(table.flatten(), index * (width + 1), lengths, width, room)


def _gather(
    token_ids: Tensor, starts: Tensor, lengths: Tensor, max_length: int, room: Room | None
) -> PackedText:
    """Pack the sequences that start at `starts` [S] int64 and are `lengths` [S] int32 long."""
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if room is None:
        total, fillers = int(offsets[-1]), 0
    else:
        total, fillers = room.tokens, room.fillers
        offsets = torch.cat([offsets, room.filler_ends(offsets[-1])])
        starts = F.pad(starts, (0, fillers))  # fillers may hold any tokens
    segments = Segments(offsets, max_length)
    sequences = segments.sequence_of(total)
    rows = starts.index_select(0, sequences) + segments.positions(sequences)
    if fillers:
        rows.clamp_(max=len(token_ids) - 1)
    return PackedText(token_ids.index_select(0, rows), segments, fillers)


@dataclass(frozen=True)
class TextPass:
    """Index tensors of one pass through the layers, computed once before the first layer."""

    token_ids: Tensor
    """[T] int64: the tokens of the encoder rows, then those of the decoder rows."""
    positions: Tensor
    """[T] int64."""
    encoder_tokens: int
    """Number of first rows, which take the bidirectional self-attention. The rest take the causal
    one."""
    encoder: AttentionLayout | None
    decoder: AttentionLayout | None
    cross: AttentionLayout | None
    """Text rows grouped by their image; None: no image, cross-attention is skipped."""
    read_rows: Tensor | None
    """[R] int64: rows whose output is read; the last layer computes no others. None: all."""
    read_cross: AttentionLayout | None
    """Layout of the cross-attention of the last layer, over the rows that are read."""


@dataclass(frozen=True)
class ImageIndex:
    """Which image each sequence looks at."""

    images: int
    """Number of images I."""
    tokens: int
    """Tokens of an image N; with `keys` the tokens of all contexts together."""
    encoder: Tensor | None = None
    """[S] int64 for the sequences of the encoder text, without fillers."""
    decoder: Tensor | None = None
    """[S] int64 for the sequences of the decoder text, without fillers."""
    keys: Segments | None = None
    """Where the tokens of each context lie, for contexts that aren't images of `tokens` tokens: the
    states of a question, or an image with its caption."""


def plan_pass(
    encoder: PackedText | None,
    decoder: PackedText | None,
    images: ImageIndex | None,
    takes_packed: bool,
) -> TextPass:
    """Plan a pass of encoder text and decoder text through the layers.

    Only the first tokens of encoder text are read, and all tokens of decoder text. Queries of one
    image don't interact in cross-attention. So the rows of all sequences that look at an image form
    one query segment, and each image's keys and values are made and read once.

    Args:
        encoder: sequences that take the bidirectional self-attention.
        decoder: sequences that take the causal self-attention.
        images: which image each sequence looks at. None: cross-attention is skipped.
        takes_packed: whether the kernel reads packed sequences and needs only a bound of their
            length. SDPA needs the index tensors of the padded layout.
    """
    texts = [text for text in (encoder, decoder) if text is not None]
    counts = [len(text.token_ids) for text in texts]
    encoder_tokens = counts[0] if encoder is not None else 0
    device = texts[0].token_ids.device
    read_rows = None
    if encoder is not None:
        decoder_rows = torch.arange(encoder_tokens, sum(counts), device=device)
        read_rows = torch.cat([encoder.first_rows, decoder_rows])
    sequences = [text.segments.sequence_of(len(text.token_ids)) for text in texts]
    positions = [text.segments.positions(s) for text, s in zip(texts, sequences, strict=True)]
    cross = read_cross = None
    if images is not None:
        indices = [index for index in (images.encoder, images.decoder) if index is not None]
        images_of_rows = []
        for index, text, rows in zip(indices, texts, sequences, strict=True):
            with_fillers = F.pad(index, (0, text.fillers))
            images_of_rows.append(with_fillers.index_select(0, rows))
        row_images = torch.cat(images_of_rows)
        # Reading the largest group's size costs no wait on a CPU and saves half of the products.
        is_static = not reads_are_free(device) or any(text.fillers for text in texts)
        kind: _Grouping = "bounded" if takes_packed else "chunks" if is_static else "largest"
        cross = read_cross = _group_by_image(row_images, images, kind)
        if read_rows is not None:
            read_images = row_images.index_select(0, read_rows)
            read_cross = _group_by_image(read_images, images, kind)
    return TextPass(
        token_ids=torch.cat([text.token_ids for text in texts]),
        positions=torch.cat(positions),
        encoder_tokens=encoder_tokens,
        encoder=_self_layout(encoder, causal=False, takes_packed=takes_packed),
        decoder=_self_layout(decoder, causal=True, takes_packed=takes_packed),
        cross=cross,
        read_rows=read_rows,
        read_cross=read_cross,
    )


def _self_layout(
    text: PackedText | None, causal: bool, takes_packed: bool
) -> AttentionLayout | None:
    if text is None:
        return None
    layout = AttentionLayout(text.segments, text.segments, causal)
    tokens = len(text.token_ids)
    return layout if takes_packed else layout.padded(tokens, tokens)


_Grouping = Literal["bounded", "chunks", "largest"]
"""Length of the query segments. A packed kernel takes a bound. SDPA pads to chunks of a static
size, or to the largest group, whose size is read from the device."""


def _group_by_image(row_images_T: Tensor, images: ImageIndex, kind: _Grouping) -> AttentionLayout:
    rows, device = len(row_images_T), row_images_T.device
    counts = row_images_T.new_zeros(images.images, dtype=torch.int32)
    counts.index_add_(0, row_images_T, torch.ones_like(row_images_T, dtype=torch.int32))
    order = row_images_T.argsort(stable=True)
    keys = images.keys or dense_segments(images.images, images.tokens, device)
    key_tokens = images.images * images.tokens if images.keys is None else images.tokens
    if kind == "chunks":
        return cut_into_chunks(counts, order, keys).padded(rows, key_tokens)
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    if kind == "bounded":
        return AttentionLayout(Segments(offsets, rows, order), keys)
    queries = Segments(offsets, int(counts.max()), order)
    return AttentionLayout(queries, keys).padded(rows, key_tokens)


def reads_are_free(device: torch.device) -> bool:
    """Whether the host can read a tensor of this device without waiting for the device."""
    return device.type == "cpu"


def cut_into_chunks(counts_I: Tensor, order_T: Tensor, keys: Segments) -> AttentionLayout:
    """Cut groups of query rows into chunks of one static length, for SDPA on a GPU.

    Without waiting for the device, the host can't know the largest group. A group of n rows makes
    ceil(n / length) chunks, and all groups together make at most rows / length + I. The length is
    the mean size of a group, so there are at most 2 I chunks: keys and values are copied at most
    twice.

    Args:
        counts_I: [I] int32, rows of each group.
        order_T: [T] int64, the rows sorted by group.
        keys: what each group looks at.
    """
    rows, groups, device = len(order_T), len(counts_I), counts_I.device
    length = max(1, -(-rows // groups))
    ends_I = counts_I.cumsum(0)
    chunk_ends_I = ((counts_I + length - 1) // length).cumsum(0)
    numbers_S = torch.arange(rows // length + groups, device=device)
    contexts_S = torch.searchsorted(chunk_ends_I, numbers_S, right=True).clamp_(max=groups - 1)
    group_ends_S = ends_I.index_select(0, contexts_S)
    left_S = chunk_ends_I.index_select(0, contexts_S) - numbers_S  # chunks left in the group
    sizes_I = (counts_I + length - 1) // length * length  # rows of its chunks, slack included
    slack_S = (sizes_I - counts_I).index_select(0, contexts_S)
    starts_S = (group_ends_S + slack_S - left_S * length).clamp_(max=rows)
    queries = Segments(F.pad(starts_S, (0, 1), value=rows).int(), length, order_T)
    return AttentionLayout(queries, keys, contexts=contexts_S)
