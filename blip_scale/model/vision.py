"""The image encoder: any timm VisionTransformer, with our attention inside.

Shapes: B batch, N image tokens (the class token first), D width, H heads, C channels of a head.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import partial

import timm
from timm.layers import LayerNorm, PatchDropout
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from blip_scale.model.attention import AttentionLayout, attention, dense_segments
from blip_scale.model.kernels import Kernel

NORM_EPS = 1e-6
"""Epsilon of every norm in BLIP's ViT (Hugging Face's BLIP config says 1e-5)."""


@dataclass(frozen=True)
class VisionConfig:
    """Which ViT, at which resolution."""

    name: str = "vit_base_patch16_224"
    """timm name of a VisionTransformer."""
    image_size: int = 224
    """Side of the square input in pixels; a multiple of the patch size."""
    overrides: dict[str, float | int | bool] = field(default_factory=dict)
    """Further timm constructor arguments, e.g. {"embed_dim": 192, "depth": 6, "num_heads": 3}."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    patch_dropout: float = 0.0
    """Share of the patches that a forward in training leaves out, drawn anew for each image."""
    frozen_layers: int = 0
    """Number of first blocks that don't train. What lies before them doesn't either."""
    other_sizes: tuple[int, ...] = ()
    """Sides of further inputs in pixels, for which the forward interpolates position embeddings."""


class VisionAttention(TimmAttention):
    """timm's self-attention with the same parameters and names, computed by `attention`."""

    kernel: Kernel = "auto"
    queries: int | None = None
    """Number of first tokens that attend to all tokens and are returned. None: all tokens."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, D] to [B, N or `queries`, D]. Image tokens all see each other.

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
    """Block that computes only the class token. The class token still sees all tokens."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, D] to [B, 1, D]."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x[:, :1] + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def read_class_token_alone(vision: VisionTransformer) -> None:
    """Make a ViT of `build_vision` return its class token alone, [B, 1, D].

    The last block then skips the other tokens. A last block that isn't timm's plain `Block` is left
    unchanged, and the ViT still returns all tokens.
    """
    last = vision.blocks[-1]
    if type(last) is Block:
        last.__class__ = ClassTokenBlock
        last.attn.queries = 1


def build_vision(
    config: VisionConfig, kernel: Kernel = "auto", gradient_checkpointing: bool = False
) -> VisionTransformer:
    """A ViT whose forward maps images [B, 3, H, W] to all normalised tokens [B, N, D], CLS first.

    Parameters are left unset: `init_weights` or a checkpoint fills them. No weight is read or drawn
    here, so the ViT can be built inside deepspeed.zero.Init.

    Raises:
        ValueError: the name is unknown or not a VisionTransformer, timm refuses the overrides, the
            image size is no multiple of the patch size, or the ViT has fewer blocks than
            `frozen_layers`.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        raise ValueError(
            f"model.vision.name: timm has no model {config.name!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()")
        )
    try:
        vision = timm.create_model(
            config.name,
            img_size=config.image_size,
            num_classes=0,
            global_pool="",
            drop_path_rate=config.drop_path_rate,
            patch_drop_rate=config.patch_dropout,
            norm_layer=partial(LayerNorm, eps=NORM_EPS),
            attn_layer=VisionAttention,
            weight_init="skip",
            **({"dynamic_img_size": True} if config.other_sizes else {}),
            **config.overrides,
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"model.vision: timm can't build {config.name} at {config.image_size} pixels "
            f"with overrides {config.overrides}: {error}"
        ) from error
    if not isinstance(vision, VisionTransformer) or not vision.has_class_token:
        raise ValueError(
            f"model.vision.name: {config.name} is a {type(vision).__name__}"
            " without a class token or not a plain ViT; take a timm vit_* or deit_* model"
        )
    patch = vision.patch_embed.patch_size[0]
    if config.image_size % patch:
        raise ValueError(
            f"model.vision.image_size: {config.image_size} is no multiple of the patch size {patch}"
        )
    for size in config.other_sizes:
        if size % patch:
            raise ValueError(
                f"data.image_sizes: {size} is no multiple of the patch size {patch} of "
                f"{config.name}; give one"
            )
    for block in vision.blocks:
        block.attn.kernel = kernel
    vision.set_grad_checkpointing(gradient_checkpointing)
    _freeze(vision, config.frozen_layers)
    return vision


def training_tokens(vision: VisionTransformer) -> int:
    """Number of tokens of an image that go through the blocks in training, after patch dropout."""
    patches: int = vision.patch_embed.num_patches
    if isinstance(vision.patch_drop, PatchDropout):  # rounded as timm rounds
        patches = max(1, int(patches * (1.0 - vision.patch_drop.prob)))
    return patches + vision.num_prefix_tokens


def _freeze(vision: VisionTransformer, layers: int) -> None:
    """Turn gradients off for the first blocks and all that comes before them.

    Autograd stops at the first block that trains, so frozen blocks have no backward at all.
    """
    depth = len(vision.blocks)
    if layers > depth:
        raise ValueError(
            f"model.vision.frozen_layers: {layers}, but the ViT has {depth} blocks; "
            f"give {depth} or fewer"
        )
    if layers:
        vision.requires_grad_(False)
        for module in (*vision.blocks[layers:], vision.norm):
            module.requires_grad_(True)
