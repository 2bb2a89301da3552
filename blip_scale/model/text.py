"""The text stack. A layer has two self-attentions, one cross-attention and one MLP.

BLIP's text encoder and text decoder share all weights except self-attention (Li et al. 2022,
section 3.1). Here they are one stack whose layers hold both self-attentions. No weights need to be
tied, and encoder and decoder tokens can go through the stack in one pass. As in BERT, norms follow
the residuals. There are no token type embeddings.

Shapes: T packed tokens, I images, N image tokens, D width, H heads, C channels of a head, R rows
that are read after the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip_scale.model.attention import AttentionLayout, attention
from blip_scale.model.dropout import Dropout
from blip_scale.model.kernels import Kernel
from blip_scale.model.packing import TextPass

Role = Literal["both", "encoder", "decoder"]
"""Self-attentions of a stack's layers. BLIP's fine-tuned models have separate encoders and
decoders, whose layers need only one."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens. [DEC] begins a caption, [ENC] an image-grounded text."""

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
    """Dropout probability of hidden states and attention probabilities."""
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


class TextEmbeddings(nn.Module):
    """Word and absolute position embeddings, normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Map token ids and positions, both [...] int64, to [..., D]."""
        return self.dropout(self.norm(self.word(token_ids) + self.position(positions)))


class SelfAttention(nn.Module):
    """Self-attention with a fused q, k, v projection, output projection, residual and norm."""

    def __init__(self, config: TextConfig, kernel: Kernel) -> None:
        super().__init__()
        self.heads, self.kernel, self.probability = config.heads, kernel, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden_TD: Tensor, layout: AttentionLayout) -> Tensor:
        """Map [T, D] to [T, D]."""
        q_THC, k_THC, v_THC = self.project(hidden_TD)
        dropout = self.probability if self.training else 0.0
        return self.finish(hidden_TD, attention(q_THC, k_THC, v_THC, layout, dropout, self.kernel))

    def project(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [T, H, C]."""
        q, k, v = self.qkv(hidden_TD).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return q, k, v

    def finish(self, hidden_TD: Tensor, context_THC: Tensor) -> Tensor:
        """Apply output projection, residual and norm to attended values [T, H, C]."""
        return self.norm(hidden_TD + self.dropout(self.output(context_THC.flatten(1))))


class ImageAttention(nn.Module):
    """Attention of text to image tokens with output projection, before residual and norm."""

    def __init__(self, config: TextConfig, image_width: int, kernel: Kernel) -> None:
        super().__init__()
        self.heads, self.kernel, self.probability = config.heads, kernel, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(image_width, 2 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(
        self, hidden_TD: Tensor, image_embeds_IND: Tensor, layout: AttentionLayout
    ) -> Tensor:
        """Map [T, D] and [I, N, image width] to [T, D]."""
        return self.attend(hidden_TD, *self.project_images(image_embeds_IND), layout)

    def project_images(self, image_embeds_IND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the image tokens, each [I * N, H, C]."""
        fused = self.key_value(image_embeds_IND.flatten(0, 1))
        k, v = fused.unflatten(-1, (2, self.heads, -1)).unbind(1)
        return k, v

    def attend(self, hidden_TD: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend with keys and values from `project_images`."""
        q_THC = self.query(hidden_TD).unflatten(-1, (self.heads, -1))
        dropout = self.probability if self.training else 0.0
        return self.output(attention(q_THC, k, v, layout, dropout, self.kernel).flatten(1))


class CrossAttention(ImageAttention):
    """Attention of text to image tokens, with output projection, residual and norm."""

    def __init__(self, config: TextConfig, image_width: int, kernel: Kernel) -> None:
        super().__init__(config, image_width, kernel)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def attend(self, hidden_TD: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
        """Attend with keys and values from `project_images`, add the residual and normalise."""
        return self.norm(hidden_TD + self.dropout(super().attend(hidden_TD, k, v, layout)))


class TextMLP(nn.Module):
    """Feed-forward block with exact GELU, residual and norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Map [T, D] to [T, D]."""
        return self.norm(hidden_TD + self.dropout(self.fc2(F.gelu(self.fc1(hidden_TD)))))


class TextLayer(nn.Module):
    """One layer. Without an image width it has only bidirectional self-attention and MLP."""

    def __init__(
        self, config: TextConfig, image_width: int | None, kernel: Kernel, role: Role = "both"
    ) -> None:
        super().__init__()
        if role != "decoder":
            self.self_attention_encoder = SelfAttention(config, kernel)
        if image_width is not None:
            if role != "encoder":
                self.self_attention_decoder = SelfAttention(config, kernel)
            self.cross_attention = CrossAttention(config, image_width, kernel)
        self.mlp = TextMLP(config)

    def forward(
        self, hidden_TD: Tensor, image_embeds_IND: Tensor | None, plan: TextPass, last: bool
    ) -> Tensor:
        """Map [T, D] to [T, D]. The last layer returns only the rows that are read, [R, D]."""
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
    """Embeddings and layers. With `image_width` None, the momentum encoder's unimodal stack."""

    def __init__(
        self,
        config: TextConfig,
        image_width: int | None,
        kernel: Kernel = "auto",
        gradient_checkpointing: bool = False,
        role: Role = "both",
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(
            TextLayer(config, image_width, kernel, role) for _ in range(config.layers)
        )

    def forward(self, plan: TextPass, image_embeds_IND: Tensor | None = None) -> Tensor:
        """Return the hidden states of the rows that the plan reads, [R, D]."""
        hidden_TD = self.embeddings(plan.token_ids, plan.positions)
        for number, layer in enumerate(self.layers, start=1):
            arguments = (hidden_TD, image_embeds_IND, plan, number == len(self.layers))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Keep torch's early stop. If the recomputation ran to the end, ZeRO-3 would release
                # the weights of the layer's last module just before the backward needs them.
                hidden_TD = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden_TD = layer(*arguments)
        return hidden_TD
