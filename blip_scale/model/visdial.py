"""BLIP for visual dialog: does an answer belong to a question, given image, caption and history?

A caption encoder reads the caption. The dialog encoder's cross-attention attends to the caption's
states and the image tokens together (Li et al. 2022, figure 5c; no code was published). Here both
encoders are one stack, like MED's text encoder: the caption goes through it without
cross-attention. If image and text differ in width (ViT-L), a linear layer maps the caption's states
to the width of the image tokens.

Shapes: I images and captions, N image tokens, D width, T packed tokens, S dialogs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_scale.model.attention import Segments
from blip_scale.model.med import MEDConfig
from blip_scale.model.packing import ImageIndex, PackedText, plan_pass
from blip_scale.model.text import TextStack
from blip_scale.model.vision import build_vision


class VisDial(nn.Module):
    """Network of VisDial: a ViT, a text encoder for captions and dialogs, and a matching head."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.config = config
        kernel, checkpointing = config.kernel, config.gradient_checkpointing
        self.vision = build_vision(config.vision, kernel, checkpointing)
        width, image_width = config.text.width, self.vision.embed_dim
        self.text_encoder = TextStack(config.text, image_width, kernel, checkpointing, "encoder")
        self.caption_proj: nn.Module = (
            nn.Identity() if width == image_width else nn.Linear(width, image_width)
        )
        self.itm_head = nn.Linear(width, 2)

    def encode_context(self, images: Tensor, captions: PackedText) -> tuple[Tensor, Segments]:
        """Return image tokens and caption states [1, T, image width], and each image's segment.

        Args:
            images: [I, 3, H, W] normalised.
            captions: I sequences whose first token is [CLS].
        """
        image_embeds = self.vision(images)
        packed = self.config.takes_packed(image_embeds)
        plan = replace(plan_pass(captions, None, None, packed), read_rows=None)
        states = self.caption_proj(self.text_encoder(plan))
        return torch.cat([image_embeds.flatten(0, 1), states])[None], beside(
            image_embeds.shape[1], captions.segments, len(states)
        )

    def match(
        self, dialogs: PackedText, context: tuple[Tensor, Segments], image_index: Tensor
    ) -> Tensor:
        """Compute logits [S, 2]; class 1 is "the last answer is true".

        Args:
            dialogs: S sequences whose first token is [ENC].
            context: from `encode_context`.
            image_index: [S] int64, index of each dialog's image.
        """
        embeds, keys = context
        packed = self.config.takes_packed(embeds)
        images = ImageIndex(keys.count, embeds.shape[1], image_index, keys=keys)
        plan = plan_pass(dialogs, None, images, packed)
        return self.itm_head(self.text_encoder(plan, embeds))


def beside(image_tokens: int, captions: Segments, caption_tokens: int) -> Segments:
    """Create segments that join the tokens of each image and of its caption into one sequence.

    In the tensor, the tokens of all images precede those of all captions.

    Args:
        image_tokens: number of tokens N of every image.
        captions: segments of the captions, one for each image.
        caption_tokens: total number of tokens of the captions.
    """
    count, device = captions.count, captions.offsets.device
    offsets = F.pad((captions.lengths + image_tokens).cumsum(0, dtype=torch.int32), (1, 0))
    images = torch.arange(count * image_tokens, device=device)
    words = torch.arange(caption_tokens, device=device) + count * image_tokens
    owners = torch.cat([images // image_tokens, captions.sequence_of(caption_tokens)])
    order = torch.cat([images, words])[owners.argsort(stable=True)]
    return Segments(offsets, captions.max_length + image_tokens, order)
