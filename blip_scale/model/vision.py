"""Builder of the image encoder: a timm ViT as a tower, with `attention` where its blocks allow it.

Shapes: B batch, N image tokens (the pooled feature first), D width, H heads, C channels of a head.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Literal

import timm
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block
from torch import Tensor

from blip_scale.model.attention import AttentionLayout, attention, dense_segments
from blip_scale.model.kernels import Kernel
from blip_scale.model.towers import (
    ARGUMENTS,
    BLIP_STATISTICS,
    ImageTower,
    Statistics,
    as_tower,
    module_of,
    refuse_other_models,
)

_LIKE_BLIPS = re.compile(r"(vit|deit)_[a-z]+_patch\d+_\d+")
"""Names of the ViTs that BLIP trains. They get BLIP's pixel statistics, not those of timm."""
Normalization = Literal["auto", "blip", "tower"]


@dataclass(frozen=True)
class VisionConfig:
    """Settings of an image tower."""

    name: str = "vit_base_patch16_224"
    """timm name of the tower, with or without the tag of its weights."""
    image_size: int = 224
    """Side of the square input in pixels; a multiple of the patch size."""
    overrides: dict[str, float | int | bool] = field(default_factory=dict)
    """Further timm constructor arguments, e.g. {"embed_dim": 192, "depth": 6, "num_heads": 3}."""
    drop_path_rate: float = 0.0
    """Stochastic depth rate of the last block. It grows linearly from 0 at the first block."""
    patch_dropout: float = 0.0
    """Share of the patches that a training forward drops. New patches are drawn for each image."""
    frozen_layers: int = 0
    """Number of first blocks that are frozen, together with all modules before them."""
    frozen: bool = False
    """Whether the whole tower is frozen."""
    other_sizes: tuple[int, ...] = ()
    """Other input sizes in pixels, for which the forward interpolates position embeddings."""
    normalization: Normalization = "auto"
    """Pixel statistics: BLIP's, or those of the tower's timm weights. `auto` takes BLIP's for the
    plain ViTs and DeiTs that BLIP trains, and the tower's for all others."""

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation for normalising the pixels of this tower."""
        is_like_blips = _LIKE_BLIPS.fullmatch(self.name.partition(".")[0])
        if self.normalization == "blip" or (self.normalization == "auto" and is_like_blips):
            return BLIP_STATISTICS
        weights = timm.get_pretrained_cfg(self.name)
        if weights is None:
            return BLIP_STATISTICS
        return tuple(weights.mean), tuple(weights.std)


class VisionAttention(TimmAttention):
    """timm's self-attention with the same parameters and names, computed by `attention`."""

    kernel: Kernel = "auto"
    queries: int | None = None
    """Number of first tokens that attend to all tokens and are returned. None: all tokens."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map [B, N, D] to [B, N or `queries`, D]. All image tokens attend to each other.

        Raises:
            ValueError: a mask is passed.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("vision attention takes no mask: image tokens all see each other")
        batch, tokens, _ = x.shape
        looking = self.queries or tokens
        gate = None if self.gate is None else self.gate(x[:, :looking]).sigmoid()
        qkv = self.qkv(x).view(batch * tokens, 3, self.num_heads, self.head_dim)
        q_THC, k_THC, v_THC = qkv.unbind(1)
        segments = looked_from = dense_segments(batch, tokens, x.device)
        if looking < tokens:
            q_THC = q_THC.unflatten(0, (batch, tokens))[:, :looking].flatten(0, 1)
            looked_from = dense_segments(batch, looking, x.device)
        dropout = self.attn_drop.p if self.training else 0.0
        context_THC = attention(
            self.q_norm(q_THC),
            self.k_norm(k_THC),
            v_THC,
            AttentionLayout(looked_from, segments),
            dropout,
            self.kernel,
        )
        x = self.norm(context_THC.reshape(batch, looking, self.attn_dim))
        return self.proj_drop(self.proj(x if gate is None else x * gate))


class ClassTokenBlock(Block):
    """Block that computes only the class token, which attends to all tokens."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map [B, N, D] to [B, 1, D]."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x[:, :1] + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def give_pooled_alone(vision: ImageTower) -> None:
    """Make a tower of `build_vision` return only its pooled feature, [B, 1, D].

    If this is the class token, a last block of timm's plain `Block` skips the other tokens. With
    any other last block, the tower still returns all tokens.
    """
    last = vision.blocks[-1]
    if not vision.pools_by_class_token:
        vision.gives_pooled_alone = True
    elif type(last) is Block and isinstance(last.attn, VisionAttention):
        last.__class__ = ClassTokenBlock
        last.attn.queries = 1


def build_vision(
    config: VisionConfig, kernel: Kernel = "auto", gradient_checkpointing: bool = False
) -> ImageTower:
    """Build a tower that maps images [B, 3, H, W] to all normalised tokens [B, N, D].

    timm's plain attention is replaced by `VisionAttention`, which can run FlashAttention. Its other
    attentions (rotary embeddings, position biases) call scaled_dot_product_attention in timm.
    Parameters are unset until `init_weights` or a checkpoint sets them, so the tower can be built
    inside deepspeed.zero.Init.

    Raises:
        ValueError: the name is unknown or is not that of a tower, timm refuses the overrides, the
            image size is not a multiple of the patch size, or the ViT has fewer blocks than
            `frozen_layers`.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        raise ValueError(
            f"model.vision.name: timm has no model {config.name!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()")
        )
    refuse_other_models(config.name)
    module = module_of(config.name)
    arguments = ARGUMENTS[module] | config.overrides
    if config.patch_dropout:
        if module == "beit":
            raise ValueError(
                f"model.vision.patch_dropout: {config.name} can't drop patches, because its "
                "position biases are between all of them; set it to 0"
            )
        arguments["patch_drop_rate"] = config.patch_dropout
    if config.other_sizes:
        if module not in ("vision_transformer", "deit"):
            raise ValueError(
                f"data.image_sizes: {config.name} reads images of one size; remove it or take a "
                "vit_* or deit* model"
            )
        arguments["dynamic_img_size"] = True
    try:
        model = timm.create_model(
            config.name,
            img_size=config.image_size,
            num_classes=0,
            drop_path_rate=config.drop_path_rate,
            **arguments,
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"model.vision: timm can't build {config.name} at {config.image_size} pixels "
            f"with overrides {config.overrides}: {error}"
        ) from error
    vision = as_tower(model, config.name)
    patch = vision.patch_embed.patch_size[0]
    if config.image_size % patch:
        raise ValueError(
            f"model.vision.image_size: {config.image_size} is not a multiple of the patch size "
            f"{patch}"
        )
    for size in config.other_sizes:
        if size % patch:
            raise ValueError(
                f"data.image_sizes: {size} is not a multiple of the patch size {patch} of "
                f"{config.name}; give one"
            )
    vision.statistics = config.statistics
    for block in vision.blocks:
        if type(block.attn) is TimmAttention:
            block.attn.__class__ = VisionAttention
            block.attn.kernel = kernel
    vision.set_grad_checkpointing(gradient_checkpointing)
    _freeze(vision, config.frozen_layers)
    if config.frozen:
        vision.requires_grad_(False)
    return vision


def training_tokens(vision: ImageTower) -> int:
    """Return the number of tokens per image in training, after patch dropout."""
    patches: int = vision.patch_embed.num_patches
    share: float = getattr(getattr(vision, "patch_drop", None), "prob", 0.0)
    if share:  # round as timm does
        patches = max(1, int(patches * (1.0 - share)))
    return patches + vision.num_prefix_tokens + vision.added_tokens


def _freeze(vision: ImageTower, layers: int) -> None:
    """Freeze the first blocks and all modules before them.

    Autograd stops at the first trained block, so frozen blocks have no backward.
    """
    depth = len(vision.blocks)
    if layers > depth:
        raise ValueError(
            f"model.vision.frozen_layers: {layers}, but the ViT has {depth} blocks; "
            f"give {depth} or fewer"
        )
    if layers:
        vision.requires_grad_(False)
        after = (vision.norm, vision.fc_norm, getattr(vision, "attn_pool", None))
        for module in (*vision.blocks[layers:], *after):
            if module is not None:
                module.requires_grad_(True)
