"""Packed text and the text stack: each layer has two self-attentions, one cross-attention, one MLP.

BLIP's text encoder and text decoder share everything but self-attention (Li et al. 2022, section 3.1).
Here they are one stack whose layers hold both self-attentions: nothing is tied, and encoder tokens and
decoder tokens can go through it in one pass. Post-norm layers as in BERT, no token-type embedding.

Shapes: T packed tokens, S sequences, I images, N image tokens, D width, H heads, C channels of a head,
R rows that are read after the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip_scale.model.attention import (
    AttentionLayout,
    Kernel,
    Segments,
    attention,
    dense_segments,
)


@dataclass(frozen=True)
class PackedText:
    """Token ids of several sequences, one after another, without pads."""

    token_ids: Tensor
    """[T] int64."""
    segments: Segments

    @staticmethod
    def from_lists(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> PackedText:
        """Packs lists of token ids; each needs at least one."""
        ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
        lengths = [len(ids) for ids in sequences]
        return PackedText(ids.to(device), Segments.from_lengths(lengths, device))

    @staticmethod
    def concatenate(texts: Sequence[PackedText]) -> PackedText:
        """The sequences of several packed texts, one text after another."""
        ends, offsets = 0, []
        for text in texts:
            offsets.append(text.segments.offsets[:-1] + ends)
            ends += len(text.token_ids)
        offsets.append(texts[0].segments.offsets.new_tensor([ends]))
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
        """Input and target of next-token prediction: all tokens but each sequence's last, and for each
        of them the token that follows, [T - S] int64. Sequences hold at least two tokens."""
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
class SpecialTokens:
    """Ids of the tokens with a role. [DEC] opens a caption, [ENC] an image-grounded text."""

    pad: int
    cls: int
    sep: int
    enc: int
    dec: int


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text stack; the defaults are BERT-base with [DEC] and [ENC] added."""

    special: SpecialTokens
    vocab_size: int = 30524
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    """On hidden states and on attention probabilities."""
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"text: width {self.width} can't be divided by {self.heads} heads")
        largest = max(vars(self.special).values())
        if largest >= self.vocab_size:
            raise ValueError(
                f"text: special token {largest} lies outside the vocabulary of {self.vocab_size}; "
                "give the size after [DEC] and [ENC] were added"
            )


@dataclass(frozen=True)
class TextPass:
    """All that one pass through the layers needs to know, computed once before the first layer."""

    token_ids: Tensor
    """[T] int64: the tokens of the encoder rows, then those of the decoder rows."""
    positions: Tensor
    """[T] int64."""
    encoder_tokens: int
    """The first rows, which take the bidirectional self-attention; the others take the causal one."""
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
    kernel: Kernel
    """The resolved attention kernel: flash takes a bound of the group sizes, SDPA the exact ones."""
    encoder: Tensor | None = None
    """[S] int64 for the sequences of the encoder text."""
    decoder: Tensor | None = None
    """[S] int64 for the sequences of the decoder text."""


def plan_pass(
    encoder: PackedText | None, decoder: PackedText | None, images: ImageIndex | None
) -> TextPass:
    """Plans a pass of encoder text (its first tokens are read) and decoder text (all are read).

    Queries of one image don't interact in cross-attention, so the rows of all sequences that look at
    an image form one query segment: each image's keys and values are made and read once.
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
    longest = len(row_images_T) if images.kernel == "flash" else int(counts.max())
    queries = Segments(offsets, longest, row_images_T.argsort(stable=True))
    return AttentionLayout(
        queries, dense_segments(images.images, images.tokens, row_images_T.device)
    )


class TextEmbeddings(nn.Module):
    """Word and absolute position embeddings, normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[...] int64 twice to [..., D]."""
        return self.dropout(self.norm(self.word(token_ids) + self.position(positions)))


class SelfAttention(nn.Module):
    """Self-attention with its output projection, residual and norm. One fused q, k, v projection."""

    def __init__(self, config: TextConfig, kernel: Kernel) -> None:
        super().__init__()
        self.heads, self.kernel, self.probability = config.heads, kernel, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_TD: Tensor, layout: AttentionLayout) -> Tensor:
        """[T, D] to [T, D]."""
        q_THC, k_THC, v_THC = self.project(hidden_TD)
        dropout = self.probability if self.training else 0.0
        return self.finish(hidden_TD, attention(q_THC, k_THC, v_THC, layout, dropout, self.kernel))

    def project(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [T, H, C]."""
        q, k, v = self.qkv(hidden_TD).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return q, k, v

    def finish(self, hidden_TD: Tensor, context_THC: Tensor) -> Tensor:
        """Output projection, residual, norm."""
        return self.norm(hidden_TD + self.dropout(self.output(context_THC.flatten(1))))


class CrossAttention(nn.Module):
    """Attention of text to image tokens, with output projection, residual and norm."""

    def __init__(self, config: TextConfig, image_width: int, kernel: Kernel) -> None:
        super().__init__()
        self.heads, self.kernel, self.probability = config.heads, kernel, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(image_width, 2 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_TD: Tensor, image_embeds_IND: Tensor, layout: AttentionLayout) -> Tensor:
        """[T, D] and [I, N, image width] to [T, D]."""
        return self.attend(hidden_TD, *self.project_images(image_embeds_IND), layout)

    def project_images(self, image_embeds_IND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the image tokens, each [I * N, H, C]."""
        fused = self.key_value(image_embeds_IND.flatten(0, 1))
        k, v = fused.unflatten(-1, (2, self.heads, -1)).unbind(1)
        return k, v

    def attend(self, hidden_TD: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
        """The rest of it, for keys and values that are there."""
        q_THC = self.query(hidden_TD).unflatten(-1, (self.heads, -1))
        dropout = self.probability if self.training else 0.0
        context_THC = attention(q_THC, k, v, layout, dropout, self.kernel)
        return self.norm(hidden_TD + self.dropout(self.output(context_THC.flatten(1))))


class TextMLP(nn.Module):
    """Feed-forward block with exact GELU, residual and norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.norm(hidden_TD + self.dropout(self.fc2(F.gelu(self.fc1(hidden_TD)))))


class TextLayer(nn.Module):
    """One layer. Without an image width it has the bidirectional self-attention and the MLP alone."""

    def __init__(self, config: TextConfig, image_width: int | None, kernel: Kernel) -> None:
        super().__init__()
        self.self_attention_encoder = SelfAttention(config, kernel)
        if image_width is not None:
            self.self_attention_decoder = SelfAttention(config, kernel)
            self.cross_attention = CrossAttention(config, image_width, kernel)
        self.mlp = TextMLP(config)

    def forward(
        self, hidden_TD: Tensor, image_embeds_IND: Tensor | None, plan: TextPass, last: bool
    ) -> Tensor:
        """[T, D] to [T, D]; the last layer returns only the rows that are read, [R, D]."""
        if plan.decoder is None:
            hidden_TD = self.self_attention_encoder(hidden_TD, plan.encoder)
        elif plan.encoder is None:
            hidden_TD = self.self_attention_decoder(hidden_TD, plan.decoder)
        else:
            n = plan.encoder_tokens
            encoded = self.self_attention_encoder(hidden_TD[:n], plan.encoder)
            decoded = self.self_attention_decoder(hidden_TD[n:], plan.decoder)
            hidden_TD = torch.cat([encoded, decoded])
        if last and plan.read_rows is not None:
            hidden_TD = hidden_TD.index_select(0, plan.read_rows)
        cross = plan.read_cross if last else plan.cross
        if image_embeds_IND is not None and cross is not None:
            hidden_TD = self.cross_attention(hidden_TD, image_embeds_IND, cross)
        return self.mlp(hidden_TD)


class TextStack(nn.Module):
    """Embeddings and layers. `image_width` None: the unimodal stack of the momentum encoder."""

    def __init__(
        self,
        config: TextConfig,
        image_width: int | None,
        kernel: Kernel = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(
            TextLayer(config, image_width, kernel) for _ in range(config.layers)
        )

    def forward(self, plan: TextPass, image_embeds_IND: Tensor | None = None) -> Tensor:
        """Hidden states of the rows that the plan reads, [R, D]."""
        hidden_TD = self.embeddings(plan.token_ids, plan.positions)
        for number, layer in enumerate(self.layers, start=1):
            arguments = (hidden_TD, image_embeds_IND, plan, number == len(self.layers))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_TD = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden_TD = layer(*arguments)
        return hidden_TD
