"""Packed text, and the plan of a pass through the text stack: all index tensors, made once.

Shapes: T packed tokens, S sequences, I images, N image tokens, R rows that are read at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.model.attention import AttentionLayout, Segments, dense_segments


@dataclass(frozen=True)
class PackedText:
    """Token ids of several sequences, one after another, without pads."""

    token_ids: Tensor
    """[T] int64."""
    segments: Segments

    @staticmethod
    def from_lists(
        sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> PackedText:
        """Packs lists of token ids; each needs at least one."""
        ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
        lengths = [len(ids) for ids in sequences]
        return PackedText(ids.to(device), Segments.from_lengths(lengths, device))

    @staticmethod
    def concatenate(texts: Sequence[PackedText]) -> PackedText:
        """The sequences of several packed texts, one text after another."""
        ends = 0
        offsets = [texts[0].segments.offsets[:1]]
        for text in texts:
            offsets.append(text.segments.offsets[1:] + ends)
            ends += len(text.token_ids)
        longest = max(text.segments.max_length for text in texts)
        ids = torch.cat([text.token_ids for text in texts])
        return PackedText(ids, Segments(torch.cat(offsets), longest))

    @property
    def first_rows(self) -> Tensor:
        """[S] int64: the place of each sequence's first token."""
        return self.segments.offsets[:-1].long()

    def with_first_token(self, token_id: int) -> PackedText:
        """The same text with every first token replaced ([CLS] by [ENC] or [DEC])."""
        ids = self.token_ids.index_fill(0, self.first_rows, token_id)
        return replace(self, token_ids=ids)

    def select(self, index: Tensor) -> PackedText:
        """The sequences index [S'], repeats allowed. Waits for the device once (the new length)."""
        lengths = self.segments.lengths.index_select(0, index)
        offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        total = int(offsets[-1])
        segments = Segments(offsets, self.segments.max_length)
        starts = self.first_rows.index_select(0, index)
        rows = starts.index_select(0, segments.sequence_of(total)) + segments.positions(total)
        return PackedText(self.token_ids.index_select(0, rows), segments)

    def split_targets(self) -> tuple[PackedText, Tensor]:
        """Input and target of next-token prediction.

        All tokens but each sequence's last, and for each of them the token that follows, [T - S]
        int64. Sequences hold at least two tokens.
        """
        old = self.segments
        steps = torch.arange(old.count + 1, dtype=torch.int32, device=old.offsets.device)
        segments = Segments(old.offsets - steps, old.max_length - 1)
        kept = len(self.token_ids) - old.count
        rows = torch.arange(kept, device=old.offsets.device) + segments.sequence_of(kept)
        text = PackedText(self.token_ids.index_select(0, rows), segments)
        return text, self.token_ids.index_select(0, rows + 1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedText:
        """The same text on another device."""
        ids = self.token_ids.to(device, non_blocking=non_blocking)
        return PackedText(ids, self.segments.to(device, non_blocking))


@dataclass(frozen=True)
class TextPass:
    """All that one pass through the layers needs to know, computed once before the first layer."""

    token_ids: Tensor
    """[T] int64: the tokens of the encoder rows, then those of the decoder rows."""
    positions: Tensor
    """[T] int64."""
    encoder_tokens: int
    """So many first rows take the bidirectional self-attention; the others take the causal one."""
    encoder: AttentionLayout | None
    decoder: AttentionLayout | None
    cross: AttentionLayout | None
    """Text rows grouped by their image; None: no image, cross-attention is skipped."""
    read_rows: Tensor | None
    """[R] int64: rows whose output is read; the last layer computes no others. None: all."""
    read_cross: AttentionLayout | None
    """As `cross`, for the rows that are read."""


@dataclass(frozen=True)
class ImageIndex:
    """Which image each sequence looks at."""

    images: int
    """Number of images I."""
    tokens: int
    """Tokens of an image N."""
    takes_packed: bool
    """Whether a bound of the group sizes is enough for the kernel; SDPA needs the largest."""
    encoder: Tensor | None = None
    """[S] int64 for the sequences of the encoder text."""
    decoder: Tensor | None = None
    """[S] int64 for the sequences of the decoder text."""
    keys: Segments | None = None
    """Where the tokens of each context lie, if it isn't an image of `tokens` tokens: the states of
    a question, an image with its caption."""


def plan_pass(
    encoder: PackedText | None, decoder: PackedText | None, images: ImageIndex | None
) -> TextPass:
    """Plans a pass of encoder text (its first tokens are read) and decoder text (all are read).

    Queries of one image don't interact in cross-attention, so the rows of all sequences that look
    at an image form one query segment: each image's keys and values are made and read once.
    """
    texts = [text for text in (encoder, decoder) if text is not None]
    counts = [len(text.token_ids) for text in texts]
    encoder_tokens = counts[0] if encoder is not None else 0
    device = texts[0].token_ids.device
    read_rows = None
    if encoder is not None:
        decoder_rows = torch.arange(encoder_tokens, sum(counts), device=device)
        read_rows = torch.cat([encoder.first_rows, decoder_rows])
    cross = read_cross = None
    if images is not None:
        indices = [i for i in (images.encoder, images.decoder) if i is not None]
        row_images = torch.cat(
            [
                index.index_select(0, text.segments.sequence_of(len(text.token_ids)))
                for index, text in zip(indices, texts, strict=True)
            ]
        )
        cross = read_cross = _group_by_image(row_images, images)
        if read_rows is not None:
            read_cross = _group_by_image(row_images.index_select(0, read_rows), images)
    return TextPass(
        token_ids=torch.cat([text.token_ids for text in texts]),
        positions=torch.cat([text.segments.positions(len(text.token_ids)) for text in texts]),
        encoder_tokens=encoder_tokens,
        encoder=_self_layout(encoder, causal=False),
        decoder=_self_layout(decoder, causal=True),
        cross=cross,
        read_rows=read_rows,
        read_cross=read_cross,
    )


def _self_layout(text: PackedText | None, causal: bool) -> AttentionLayout | None:
    return None if text is None else AttentionLayout(text.segments, text.segments, causal)


def _group_by_image(row_images_T: Tensor, images: ImageIndex) -> AttentionLayout:
    counts = row_images_T.new_zeros(images.images, dtype=torch.int32)
    counts.index_add_(0, row_images_T, torch.ones_like(row_images_T, dtype=torch.int32))
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    longest = len(row_images_T) if images.takes_packed else int(counts.max())
    queries = Segments(offsets, longest, row_images_T.argsort(stable=True))
    keys = images.keys or dense_segments(images.images, images.tokens, row_images_T.device)
    return AttentionLayout(queries, keys)
