"""MED, BLIP's multimodal mixture of encoder and decoder, and the momentum copy of its towers.

One ViT and one text stack serve three uses: unimodal text encoder (contrastive), image-grounded
text encoder (matching) and image-grounded decoder (language modelling); Li et al. 2022, section 3.

Every parameter is read inside the forward of the module that holds it, and no constructor reads a
weight. So MED can be built inside deepspeed.zero.Init and trained under ZeRO-3.

Shapes: B batch, I images, N image tokens, D width, E embed_dim, S sequences, T packed tokens,
P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_scale.model.kernels import Kernel, choose_kernel
from blip_scale.model.packing import ImageIndex, PackedText, plan_pass
from blip_scale.model.text import TextConfig, TextStack
from blip_scale.model.vision import VisionConfig, build_vision, give_pooled_alone


@dataclass(frozen=True)
class MEDConfig:
    """Settings that determine the network's architecture."""

    vision: VisionConfig
    text: TextConfig
    embed_dim: int = 256
    """Width of the contrastive space."""
    temperature: float = 0.07
    """Initial contrastive temperature, a divisor of the similarities."""
    kernel: Kernel = "auto"
    """Attention kernel; see `choose_kernel`."""
    gradient_checkpointing: bool = False
    """Recompute each ViT block and text layer in the backward pass."""

    def takes_packed(self, tensor: Tensor) -> bool:
        """Whether the text layers run a packed kernel on tensors of this device and dtype."""
        head_dim = self.text.width // self.text.heads
        return choose_kernel(self.kernel, tensor.device, tensor.dtype, head_dim).takes_packed


class Temperature(nn.Module):
    """The learned contrastive temperature. ZeRO-3 gathers by module, so it is one."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.initial = value
        self.value = nn.Parameter(torch.full((1,), value))

    def forward(self) -> Tensor:
        """A copy of the temperature, fp32 scalar with gradient. ZeRO-3 releases the parameter."""
        return self.value.to(torch.float32, copy=True).squeeze(0)


class LMHead(nn.Module):
    """BERT's prediction head. Its matrix is the word embedding, registered here as well."""

    def __init__(self, config: TextConfig, word_weight: Tensor) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.weight = word_weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] to logits [T, V]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden_TD))), self.weight, self.bias)


class UnimodalEncoder(nn.Module):
    """Both towers and their projections: the part that MED and its momentum copy share."""

    def __init__(self, config: MEDConfig, multimodal: bool) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision, config.kernel, config.gradient_checkpointing)
        image_width = self.vision.embed_dim
        self.text = TextStack(
            config.text,
            image_width if multimodal else None,
            config.kernel,
            config.gradient_checkpointing,
        )
        self.vision_proj = nn.Linear(image_width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] to image_embeds [B, N, D], the pooled feature first."""
        return self.vision(images)

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """image_embeds [B, N, D] to image_features [B, E], fp32, of norm 1."""
        return F.normalize(self.vision_proj(image_embeds[:, 0]).float(), dim=-1)

    def encode_text(self, text: PackedText) -> Tensor:
        """Text that begins with [CLS], without images, to the first tokens' states [S, D]."""
        # `parameters` instead of `weight`: under ZeRO-3 an access by name would gather the weight.
        takes_packed = self.config.takes_packed(next(self.text_proj.parameters()))
        return self.text(plan_pass(text, None, None, takes_packed))

    def project_text(self, states: Tensor) -> Tensor:
        """First-token states [S, D] to text_features [S, E], fp32, of norm 1."""
        return F.normalize(self.text_proj(states).float(), dim=-1)


class MED(UnimodalEncoder):
    """The whole network. `init_weights` or checkpoints (interop) fill its parameters."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__(config, multimodal=True)
        self.itm_head = nn.Linear(config.text.width, 2)
        self.lm_head = LMHead(config.text, self.text.embeddings.word.weight)
        self.temperature = Temperature(config.temperature)

    def match(self, text: PackedText, image_embeds: Tensor, image_index: Tensor) -> Tensor:
        """Matching logits of text-image pairs; class 1 is "they belong together".

        Args:
            text: S sequences whose first token is [ENC].
            image_embeds: [I, N, D].
            image_index: [S] int64, the image of each sequence.

        Returns:
            [S, 2].
        """
        images = ImageIndex(len(image_embeds), image_embeds.shape[1], encoder=image_index)
        plan = plan_pass(text, None, images, self.config.takes_packed(image_embeds))
        return self.itm_head(self.text(plan, image_embeds))

    def decode(self, text: PackedText, image_embeds: Tensor, image_index: Tensor) -> Tensor:
        """Next-token logits [T, V] at every token of captions beginning with [DEC]; see `match`."""
        images = ImageIndex(len(image_embeds), image_embeds.shape[1], decoder=image_index)
        plan = plan_pass(None, text, images, self.config.takes_packed(image_embeds))
        return self.lm_head(self.text(plan, image_embeds))

    def sweep(
        self,
        match_text: PackedText,
        decode_text: PackedText,
        image_embeds: Tensor,
        match_image_index: Tensor,
        decode_image_index: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Matching and captioning in one pass through the layers.

        Equals `match` on match_text and `decode` on decode_text without each caption's last token,
        which predicts nothing. But each layer projects the image tokens to keys and values once and
        runs its cross-attention and MLP once.

        Args:
            match_text: Sm sequences beginning with [ENC].
            decode_text: Sd captions beginning with [DEC], of at least two tokens.
            image_embeds: [I, N, D].
            match_image_index: [Sm] int64.
            decode_image_index: [Sd] int64.

        Returns:
            itm_logits [Sm, 2], lm_logits [P, V], lm_targets [P] int64, where P is the tokens of
            decode_text less its sequences. Fillers have no ITM logits, and `IGNORED` as targets.
        """
        inputs, lm_targets = decode_text.split_targets()
        count, tokens, _ = image_embeds.shape
        images = ImageIndex(count, tokens, match_image_index, decode_image_index)
        plan = plan_pass(match_text, inputs, images, self.config.takes_packed(image_embeds))
        states = self.text(plan, image_embeds)
        firsts = match_text.count
        return self.itm_head(states[:firsts]), self.lm_head(states[firsts:]), lm_targets


class MomentumEncoder(UnimodalEncoder):
    """The momentum copy: ViT, unimodal text (no cross-attention, no decoder) and projections.

    It has no gradients. Its parameters are named as in MED and filled from MED. Its image_embeds
    are the pooled feature alone, [B, 1, D].
    """

    def __init__(self, config: MEDConfig) -> None:
        # No patch dropout: an image's soft targets and queued features must not depend on a draw.
        vision = replace(config.vision, patch_dropout=0.0)
        super().__init__(
            replace(config, vision=vision, gradient_checkpointing=False), multimodal=False
        )
        give_pooled_alone(self.vision)  # project_image reads no other token
        self.requires_grad_(False)

    def share_frozen(self, med: MED) -> None:
        """Replace the copies of the MED's frozen parameters by these parameters themselves."""
        online = dict(med.named_parameters())
        for name, _ in list(self.named_parameters()):
            if not online[name].requires_grad:
                path, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(path), leaf, online[name])

    def pairs(self, med: MED) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, momentum parameter, online parameter) of every parameter, always in this order."""
        online = dict(med.named_parameters())
        for name, parameter in self.named_parameters():
            yield name, parameter, online[name]
