"""Packed text, and the plan of a pass through the text stack: all index tensors, computed once.

Static shapes: a text can be padded to a fixed size. Its last sequences are then fillers. They go
through the layers and attend to image 0, but nothing reads their output. Losses and gradients equal
those of the text without fillers.

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
"""Target that the LM loss ignores: a token of a prompt, or a filler."""
_ALIGNMENT = 8
"""Sizes are multiples of this many rows, because GPUs compute matrix products in tiles of them."""


@dataclass(frozen=True)
class Room:
    """Static size to which texts are padded."""

    tokens: int
    """Total number of tokens of text and fillers."""
    fillers: int
    """Number of filler sequences."""

    @staticmethod
    def between(fewest: int, most: int, max_length: int) -> Room:
        """Return a room for texts of `fewest` to `most` tokens, fillers of 2 to `max_length`."""
        fillers = math.ceil((most - fewest + _ALIGNMENT - 1) / (max_length - 2))
        tokens = math.ceil((most + 2 * fillers) / _ALIGNMENT) * _ALIGNMENT
        return Room(tokens, fillers)

    def fits(self, tokens: Tensor, max_length: int) -> Tensor:
        """Whether a text of `tokens` tokens leaves 2 to `max_length` tokens for each filler.

        `tokens` is an integer scalar tensor. The result is a bool scalar on its device.
        """
        rest = self.tokens - tokens
        return (rest >= 2 * self.fillers) & (rest <= max_length * self.fillers)

    def filler_ends(self, tokens: Tensor) -> Tensor:
        """Return the end offsets [fillers] int32 of the fillers after a text of `tokens` tokens.

        `tokens` is an int32 scalar tensor. The fillers divide the remaining tokens evenly.
        """
        steps = torch.arange(1, self.fillers + 1, dtype=torch.int32, device=tokens.device)
        return tokens + (self.tokens - tokens) * steps // self.fillers


@dataclass(frozen=True)
class PackedText:
    """Token ids of several sequences, concatenated without pads."""

    token_ids: Tensor
    """Ids of all tokens, [T] int64."""
    segments: Segments
    """Boundaries of the sequences in `token_ids`, including fillers."""
    fillers: int = 0
    """Number of last sequences that only pad the tensor to a static size."""

    @staticmethod
    def from_lists(
        sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> PackedText:
        """Pack lists of token ids. Each list holds at least one token."""
        ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
        lengths = [len(ids) for ids in sequences]
        return PackedText(ids.to(device), Segments.from_lengths(lengths, device))

    @property
    def count(self) -> int:
        """Number of sequences S without fillers."""
        return self.segments.count - self.fillers

    @property
    def lengths(self) -> Tensor:
        """Length of each sequence, [S] int32, without fillers."""
        return self.segments.lengths[: self.count]

    @property
    def first_rows(self) -> Tensor:
        """Row of each sequence's first token, [S] int64, without fillers."""
        return self.segments.offsets[: self.count].long()

    def with_first_token(self, token_id: int) -> PackedText:
        """Replace every first token, for example [CLS] by [ENC] or [DEC]."""
        ids = self.token_ids.index_fill(0, self.first_rows, token_id)
        return replace(self, token_ids=ids)

    def select(self, index: Tensor, room: Room | None = None) -> PackedText:
        """Select the sequences with these indices, in this order.

        Args:
            index: [S'] int64; repeats are allowed.
            room: static size; `Room.fits` must hold for the selected sequences. None: no fillers,
                and the host waits for the device once, to read the new length.
        """
        lengths = self.lengths.index_select(0, index)
        starts = self.first_rows.index_select(0, index)
        return _gather(self.token_ids, starts, lengths, self.segments.max_length, room)

    def table(self, width: int) -> Tensor:
        """Build a table [S, width + 1] int64: sequence s, then zeros, and its length at the end.

        `width` must be at least the length of the longest sequence.
        """
        lengths = self.lengths
        places = torch.arange(width, device=lengths.device)
        rows = (self.first_rows[:, None] + places).clamp_(max=len(self.token_ids) - 1)
        ids = self.token_ids[rows].masked_fill_(places >= lengths[:, None], 0)
        return torch.cat([ids, lengths[:, None].long()], dim=1)

    def split_targets(self) -> tuple[PackedText, Tensor]:
        """Return inputs and targets of next-token prediction.

        Inputs are all tokens except each sequence's last. Targets [T - S] int64 are the next
        tokens, and `IGNORED` in fillers. Every sequence must hold at least two tokens.
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
        """Copy the text to another device."""
        ids = self.token_ids.to(device, non_blocking=non_blocking)
        return PackedText(ids, self.segments.to(device, non_blocking), self.fillers)


def select_from_table(table: Tensor, index: Tensor, room: Room | None) -> PackedText:
    """Select sequences like `PackedText.select`, but from a table of `PackedText.table`."""
    width = table.shape[1] - 1
    lengths = table[:, -1].index_select(0, index).int()
    return _gather(table.flatten(), index * (width + 1), lengths, width, room)


def _gather(
    token_ids: Tensor, starts: Tensor, lengths: Tensor, max_length: int, room: Room | None
) -> PackedText:
    """Pack the sequences that start at `starts` [S] int64 and have `lengths` [S] int32."""
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if room is None:
        total, fillers = int(offsets[-1]), 0
    else:
        total, fillers = room.tokens, room.fillers
        offsets = torch.cat([offsets, room.filler_ends(offsets[-1])])
        starts = F.pad(starts, (0, fillers))  # the tokens of fillers don't matter
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
    """Tokens of the encoder rows, then those of the decoder rows, [T] int64."""
    positions: Tensor
    """Position of each token in its sequence, [T] int64."""
    encoder_tokens: int
    """Number of encoder rows, which come first and take the bidirectional self-attention. The
    others take the causal one."""
    encoder: AttentionLayout | None
    decoder: AttentionLayout | None
    cross: AttentionLayout | None
    """Text rows grouped by their image. None: there is no image, and cross-attention is skipped."""
    read_rows: Tensor | None
    """Rows whose output is read, [R] int64. The last layer computes only these. None: all."""
    read_cross: AttentionLayout | None
    """Layout of the last layer's cross-attention, for the rows that are read."""


@dataclass(frozen=True)
class ImageIndex:
    """The image that each sequence attends to."""

    images: int
    """Number of images I."""
    tokens: int
    """Number of tokens N of an image. With `keys`, the total number of tokens of all contexts."""
    encoder: Tensor | None = None
    """Image of each sequence of the encoder text, [S] int64, without fillers."""
    decoder: Tensor | None = None
    """Image of each sequence of the decoder text, [S] int64, without fillers."""
    keys: Segments | None = None
    """Boundaries of the contexts, if these aren't images of `tokens` tokens but the states of a
    question, or an image with its caption."""


def plan_pass(
    encoder: PackedText | None,
    decoder: PackedText | None,
    images: ImageIndex | None,
    takes_packed: bool,
) -> TextPass:
    """Plan a pass of encoder text and decoder text through the layers.

    After the last layer, only the first tokens of encoder text are read, but all tokens of decoder
    text. In cross-attention, queries of the same image don't interact. The rows of all sequences
    that attend to an image therefore form one query segment, and the keys and values of each image
    are computed and read only once.

    Args:
        encoder: sequences that take the bidirectional self-attention.
        decoder: sequences that take the causal self-attention.
        images: the image that each sequence attends to. None: cross-attention is skipped.
        takes_packed: whether the kernel takes packed sequences, which need only a bound of their
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
        # On a CPU, reading the size of the largest group is free, and it halves the products.
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
"""Length of the query segments. A packed kernel takes an upper bound. SDPA pads to chunks of a
static size, or to the size of the largest group, which the host reads from the device."""


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

    The host would have to wait for the device to know the largest group. A group of n rows makes
    ceil(n / length) chunks, and all groups make at most rows / length + I chunks. With the mean
    size of a group as the length, there are at most 2 I chunks. Keys and values are therefore
    copied at most twice.

    Args:
        counts_I: [I] int32, number of rows of each group.
        order_T: [T] int64, the rows sorted by group.
        keys: boundaries of the keys of each group.
    """
    rows, groups, device = len(order_T), len(counts_I), counts_I.device
    length = max(1, -(-rows // groups))
    ends_I = counts_I.cumsum(0)
    chunk_ends_I = ((counts_I + length - 1) // length).cumsum(0)
    numbers_S = torch.arange(rows // length + groups, device=device)
    contexts_S = torch.searchsorted(chunk_ends_I, numbers_S, right=True).clamp_(max=groups - 1)
    group_ends_S = ends_I.index_select(0, contexts_S)
    left_S = chunk_ends_I.index_select(0, contexts_S) - numbers_S  # remaining chunks of the group
    sizes_I = (counts_I + length - 1) // length * length  # rows of all its chunks, with slack
    slack_S = (sizes_I - counts_I).index_select(0, contexts_S)
    starts_S = (group_ends_S + slack_S - left_S * length).clamp_(max=rows)
    queries = Segments(F.pad(starts_S, (0, 1), value=rows).int(), length, order_T)
    return AttentionLayout(queries, keys, contexts=contexts_S)
