"""MED, BLIP's multimodal mixture of encoder and decoder, and the momentum copy of its towers.

One ViT and one text stack have three uses: unimodal text encoder (contrastive), image-grounded
text encoder (matching) and image-grounded decoder (language modelling). See Li et al. 2022,
section 3.

Every parameter is read only in the forward of the module that holds it, and no constructor reads a
weight. Therefore MED can be built inside deepspeed.zero.Init and trained under ZeRO-3.

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
    """Initial contrastive temperature. Similarities are divided by it."""
    kernel: Kernel = "auto"
    """Attention kernel; see `choose_kernel`."""
    gradient_checkpointing: bool = False
    """Whether to recompute each ViT block and text layer in the backward pass."""

    def takes_packed(self, tensor: Tensor) -> bool:
        """Whether the text layers run a packed kernel on tensors of this device and dtype."""
        head_dim = self.text.width // self.text.heads
        return choose_kernel(self.kernel, tensor.device, tensor.dtype, head_dim).takes_packed


class Temperature(nn.Module):
    """The learned contrastive temperature. It is a module because ZeRO-3 gathers by module."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.initial = value
        self.value = nn.Parameter(torch.full((1,), value))

    def forward(self) -> Tensor:
        """Return a copy of the temperature, an fp32 scalar with gradient.

        ZeRO-3 releases the parameter itself after the forward.
        """
        return self.value.to(torch.float32, copy=True).squeeze(0)


class LMHead(nn.Module):
    """BERT's prediction head. Its matrix is the word embedding, which is also registered here."""

    def __init__(self, config: TextConfig, word_weight: Tensor) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.weight = word_weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Map [T, D] to logits [T, V]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden_TD))), self.weight, self.bias)


class UnimodalEncoder(nn.Module):
    """Both towers and their projections: the modules that MED and the momentum encoder share."""

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
        """Map normalised pixels [B, 3, H, W] to image_embeds [B, N, D], pooled feature first."""
        return self.vision(images)

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """Map image_embeds [B, N, D] to L2-normalised image_features [B, E], fp32."""
        return F.normalize(self.vision_proj(image_embeds[:, 0]).float(), dim=-1)

    def encode_text(self, text: PackedText) -> Tensor:
        """Encode text that begins with [CLS], without images, to first-token states [S, D]."""
        # Use `parameters`, not `weight`: under ZeRO-3, access by name would gather the weight.
        takes_packed = self.config.takes_packed(next(self.text_proj.parameters()))
        return self.text(plan_pass(text, None, None, takes_packed))

    def project_text(self, states: Tensor) -> Tensor:
        """Map first-token states [S, D] to L2-normalised text_features [S, E], fp32."""
        return F.normalize(self.text_proj(states).float(), dim=-1)


class MED(UnimodalEncoder):
    """The whole network. `init_weights` or a checkpoint (interop) sets its parameters."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__(config, multimodal=True)
        self.itm_head = nn.Linear(config.text.width, 2)
        self.lm_head = LMHead(config.text, self.text.embeddings.word.weight)
        self.temperature = Temperature(config.temperature)

    def match(self, text: PackedText, image_embeds: Tensor, image_index: Tensor) -> Tensor:
        """Compute matching logits of text-image pairs; class 1 is "match".

        Args:
            text: S sequences whose first token is [ENC].
            image_embeds: [I, N, D].
            image_index: [S] int64, index of each sequence's image.

        Returns:
            [S, 2].
        """
        images = ImageIndex(len(image_embeds), image_embeds.shape[1], encoder=image_index)
        plan = plan_pass(text, None, images, self.config.takes_packed(image_embeds))
        return self.itm_head(self.text(plan, image_embeds))

    def decode(self, text: PackedText, image_embeds: Tensor, image_index: Tensor) -> Tensor:
        """Compute next-token logits [T, V] for captions that begin with [DEC]; see `match`."""
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
        """Compute matching and captioning in one pass through the layers.

        The result equals `match` on match_text, and `decode` on decode_text without each caption's
        last token, which predicts nothing. In one pass, each layer projects the image tokens to
        keys and values only once, and runs its cross-attention and MLP only once.

        Args:
            match_text: Sm sequences whose first token is [ENC].
            decode_text: Sd captions of at least two tokens, whose first token is [DEC].
            image_embeds: [I, N, D].
            match_image_index: [Sm] int64.
            decode_image_index: [Sd] int64.

        Returns:
            itm_logits [Sm, 2], lm_logits [P, V] and lm_targets [P] int64, where P is the tokens of
            decode_text minus its sequences. Fillers have no ITM logits and the target `IGNORED`.
        """
        inputs, lm_targets = decode_text.split_targets()
        count, tokens, _ = image_embeds.shape
        images = ImageIndex(count, tokens, match_image_index, decode_image_index)
        plan = plan_pass(match_text, inputs, images, self.config.takes_packed(image_embeds))
        states = self.text(plan, image_embeds)
        firsts = match_text.count
        return self.itm_head(states[:firsts]), self.lm_head(states[firsts:]), lm_targets


class MomentumEncoder(UnimodalEncoder):
    """The momentum encoder: ViT, unimodal text (no cross-attention, no decoder) and projections.

    It has no gradients. Its parameters have MED's names and start with MED's values. Its
    image_embeds are only the pooled feature, [B, 1, D].
    """

    def __init__(self, config: MEDConfig) -> None:
        # No patch dropout: soft targets and queued features of an image must not be random.
        vision = replace(config.vision, patch_dropout=0.0)
        super().__init__(
            replace(config, vision=vision, gradient_checkpointing=False), multimodal=False
        )
        give_pooled_alone(self.vision)  # project_image reads no other token
        self.requires_grad_(False)

    def share_frozen(self, med: MED) -> None:
        """Replace the copies of the MED's frozen parameters by the MED's parameters themselves."""
        online = dict(med.named_parameters())
        for name, _ in list(self.named_parameters()):
            if not online[name].requires_grad:
                path, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(path), leaf, online[name])

    def pairs(self, med: MED) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Yield (name, momentum parameter, online parameter) of all parameters in fixed order."""
        online = dict(med.named_parameters())
        for name, parameter in self.named_parameters():
            yield name, parameter, online[name]
