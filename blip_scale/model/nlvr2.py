"""BLIP for NLVR2: is a sentence true of a pair of images?

Each layer has one cross-attention for each image. The lower half of the layers averages their
outputs, and the upper half merges them by a linear layer (Li et al. 2022, figure 5b).

Shapes: B pairs, N image tokens, D width, T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip_scale.model.attention import AttentionLayout
from blip_scale.model.dropout import Dropout
from blip_scale.model.kernels import Kernel
from blip_scale.model.med import MEDConfig
from blip_scale.model.packing import ImageIndex, PackedText, plan_pass
from blip_scale.model.text import ImageAttention, TextConfig, TextLayer, TextStack
from blip_scale.model.vision import build_vision


class PairCrossAttention(nn.Module):
    """Attention of text to both images, with one residual and norm."""

    def __init__(self, config: TextConfig, image_width: int, kernel: Kernel, merge: bool) -> None:
        super().__init__()
        self.images = nn.ModuleList(ImageAttention(config, image_width, kernel) for _ in range(2))
        if merge:
            self.merge_layer = nn.Linear(2 * config.width, config.width)
        self.merge = merge
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden_TD: Tensor, image_embeds: Tensor, layout: AttentionLayout) -> Tensor:
        """Map [T, D] and [2B, N, image width] to [T, D]. All first images precede second ones."""
        halves = image_embeds.chunk(2)
        first, second = (
            attend(hidden_TD, half, layout)
            for attend, half in zip(self.images, halves, strict=True)
        )
        if self.merge:
            merged = self.merge_layer(torch.cat([first, second], -1))
        else:
            merged = (first + second) / 2
        return self.norm(hidden_TD + self.dropout(merged))


class NLVR2(nn.Module):
    """Network of NLVR2: a ViT, a text encoder that attends to both images, and a classifier."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.config = config
        text, kernel, checkpointing = config.text, config.kernel, config.gradient_checkpointing
        self.vision = build_vision(config.vision, kernel, checkpointing)
        image_width = self.vision.embed_dim
        self.text_encoder = TextStack(text, image_width, kernel, checkpointing, "encoder")
        for number, layer in enumerate(self.text_encoder.layers):
            assert isinstance(layer, TextLayer)
            merge = number >= text.layers // 2
            pair: nn.Module = PairCrossAttention(text, image_width, kernel, merge)
            layer.add_module("cross_attention", pair)
        self.cls_head = nn.Sequential(
            nn.Linear(text.width, text.width), nn.ReLU(), nn.Linear(text.width, 2)
        )

    def forward(self, images: Tensor, sentences: PackedText) -> Tensor:
        """Compute logits [B, 2]; class 1 is "true".

        Args:
            images: [2B, 3, H, W] normalised. All first images precede all second ones.
            sentences: B sequences whose first token is [ENC].
        """
        image_embeds = self.vision(images)
        pairs, tokens = len(images) // 2, image_embeds.shape[1]
        packed = self.config.takes_packed(image_embeds)
        pair_numbers = torch.arange(pairs, device=images.device)
        plan = plan_pass(sentences, None, ImageIndex(pairs, tokens, encoder=pair_numbers), packed)
        return self.cls_head(self.text_encoder(plan, image_embeds))
