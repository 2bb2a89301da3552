"""Image towers: timm's ViTs behind one interface.

timm's forward is unchanged. A tower built by `vision.build_vision` is the timm model with the same
parameter names. Only its class is replaced by one of those below.

Every tower returns its pooled feature as the first token. If timm pools by the class token, this
is the class token. If timm pools by attention or by a mean, the feature is prepended. The
contrastive loss, momentum encoders and cross-attention can then treat all towers alike, and the
parameters of the pooling get a gradient in every task.

Shapes: B batch, N image tokens (the pooled feature first), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import beit
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm, beit.Block)
"""Classes of the blocks of all towers."""
RELATIVE_TABLE = "relative_position_bias_table"
"""Last part of the names of BEiT's position parameters."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each colour channel, for pixels in [0, 1]."""
BLIP_STATISTICS: Statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
"""Statistics of the normalised pixels that all towers receive."""


class ImageTower(nn.Module):
    """Interface of all towers. Each tower's second base, a timm class, provides the attributes."""

    blocks: Any
    """Blocks in order. They are checkpointed and compiled one by one."""
    patch_embed: Any
    pos_embed: Any
    norm: Any
    fc_norm: nn.Module
    forward_features: Callable[[Tensor], Tensor]
    forward_head: Callable[..., Tensor]
    set_grad_checkpointing: Callable[[bool], None]
    embed_dim: int
    """Width D of the tokens."""
    num_prefix_tokens: int
    """Number of tokens that timm puts before the patches: class token, registers."""
    global_pool: str
    statistics: Statistics = BLIP_STATISTICS
    """Statistics for normalising the pixels of this tower."""
    gives_pooled_alone: bool = False
    """Whether `forward` returns only the pooled feature."""

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, 3, H, W] with BLIP's normalisation to [B, N, D], the pooled feature first."""
        if self.statistics != BLIP_STATISTICS:
            scale, shift = _conversion(self.statistics, images.device)
            images = (images.float() * scale + shift).to(images.dtype)
        tokens = self.forward_features(images)
        if self.pools_by_class_token:
            return tokens
        pooled = self.forward_head(tokens, pre_logits=True)[:, None]
        if self.gives_pooled_alone:
            return pooled
        # In some towers, timm's last norm follows the pooling. Here it is applied to tokens too.
        return torch.cat([pooled, self.fc_norm(tokens)], dim=1)

    @property
    def pools_by_class_token(self) -> bool:
        """Whether the pooled feature is the class token, as in BLIP."""
        is_plain = isinstance(self.fc_norm, nn.Identity)
        is_distilled = isinstance(self, VisionTransformerDistilled)  # it averages two tokens
        return self.global_pool == "token" and is_plain and not is_distilled

    @property
    def is_like_blips(self) -> bool:
        """Whether the tower computes the same function as BLIP's ViT, apart from sizes."""
        is_plain = type(self) is VitTower and all(type(b) is Block for b in self.blocks)
        return is_plain and self.pools_by_class_token and self.statistics == BLIP_STATISTICS

    @property
    def added_tokens(self) -> int:
        """Number of tokens that the tower prepends to timm's."""
        return 0 if self.pools_by_class_token else 1

    @property
    def heads(self) -> int:
        """Number of attention heads of a block."""
        return int(self.blocks[0].attn.num_heads)

    @property
    def mlp_width(self) -> int:
        """Input width of the last linear layer of a block's MLP."""
        return int(self.blocks[0].mlp.fc2.in_features)

    @property
    def description(self) -> str:
        """Text that tells towers of equal sizes apart."""
        block = self.blocks[0]
        act = getattr(block.mlp, "act", block.mlp)
        rope = getattr(self, "rope", None)
        parts = (block, block.attn, block.mlp, act, block.norm1, *([] if rope is None else [rope]))
        kinds = [type(part).__name__.replace("VisionAttention", "Attention") for part in parts]
        pooling = "class token" if self.pools_by_class_token else f"pooling {self.global_pool}"
        mean = ", ".join(f"{value:.3f}" for value in self.statistics[0])
        return f"{' '.join(kinds)}, {pooling}, pixel mean {mean}"


class VitTower(ImageTower, VisionTransformer):
    """ViT, DeiT, CLIP, SigLIP, DINOv2, AIMv2."""


class DistilledTower(ImageTower, VisionTransformerDistilled):
    """DeiT with a distillation token."""


class EvaTower(ImageTower, Eva):
    """EVA, EVA02, DINOv3, Perception Encoder, ViTs with rotary position embeddings."""


class BeitTower(ImageTower, Beit):
    """BEiT and BEiT v2."""


TOWERS: dict[type[nn.Module], type[ImageTower]] = {
    VisionTransformer: VitTower,
    VisionTransformerDistilled: DistilledTower,
    Eva: EvaTower,
    Beit: BeitTower,
}
"""timm class -> class of the tower."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "vision_transformer": {"weight_init": "skip"},
    "deit": {"weight_init": "skip"},
    # Compute the positions of one size only once. With dynamic sizes, the host computes them in
    # every pass, which waits for the device and can't be captured in a CUDA graph.
    "eva": {"dynamic_img_size": False},
    "beit": {},
}
"""timm module of the name -> additional constructor arguments."""
_REASONS = {
    "naflexvit": "reads images of any aspect ratio, and the loader makes squares; the ViT of the "
    "same name without naflex has such weights for squares, e.g. vit_base_patch16_siglip_256",
    "vision_transformer_hybrid": "has a CNN before its blocks",
    "vision_transformer_relpos": "computes its position biases by networks of its own",
    "vision_transformer_sam": "attends within windows and has neither class token nor pooling",
}
"""timm module -> why its models can't be towers."""
EXPECTED = (
    "expected one of timm's vit_*, deit*, eva*, aimv2* or beit* models: ViT, DeiT, CLIP, SigLIP, "
    "DINOv2, DINOv3, PE, EVA02, AIMv2, BEiT; see docs/towers.md"
)


def refuse_other_models(name: str) -> None:
    """Raise ValueError if timm's model of this name is not a tower, without building it."""
    module = module_of(name)
    if module not in ARGUMENTS:
        reason = _REASONS.get(module, f"is a model of timm's {module}, not a plain ViT")
        raise ValueError(f"model.vision.name: {name} {reason}; {EXPECTED}")


def module_of(name: str) -> str:
    """Return the last part of the name of the timm module that defines a model."""
    entrypoint = timm.model_entrypoint(name.partition(".")[0])
    return entrypoint.__module__.rpartition(".")[2]


def as_tower(model: nn.Module, name: str) -> ImageTower:
    """Turn a timm model into a tower, in place.

    Raises:
        ValueError: the model's blocks or patch embedding are not those of a tower.
    """
    tower = TOWERS.get(type(model))
    if tower is None:
        raise ValueError(f"model.vision.name: {name} is a {type(model).__name__}; {EXPECTED}")
    kinds = {type(block) for block in model.blocks}  # type: ignore[union-attr]
    others = sorted(kind.__name__ for kind in kinds if kind not in BLOCKS)
    if others:
        raise ValueError(f"model.vision.name: {name} has blocks of type {others[0]}; {EXPECTED}")
    if not isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d):
        kind = type(model.patch_embed).__name__
        raise ValueError(f"model.vision.name: {name} embeds patches by {kind}; {EXPECTED}")
    model.__class__ = tower
    assert isinstance(model, ImageTower)
    rope = getattr(model, "rope", None)
    if rope is not None:  # in training, DINOv3 rescales positions by a random draw on the host
        rope.aug_active = False
    return model


def refill_constants(network: nn.Module, device: torch.device | None = None) -> None:
    """Compute the constants of the towers' position embeddings in fp32.

    A network built on the meta device has no values for them. In one built inside
    deepspeed.zero.Init, they are rounded to the dtype of the weights.

    Args:
        network: network with towers, changed in place.
        device: device of the constants. None: keep the current one.
    """
    for tower in network.modules():
        if isinstance(tower, ImageTower):
            for module in tower.modules():
                _refill(module, device)


def _refill(module: nn.Module, device: torch.device | None) -> None:
    fill = getattr(module, "init_non_persistent_buffers", None)
    if fill is None:
        return
    for name, buffer in list(module.named_buffers(recurse=False)):
        dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
        if name == "k_bias":  # zeros that are concatenated with weights
            dtype = next(module.parameters()).dtype
        module.register_buffer(
            name, torch.empty_like(buffer, dtype=dtype, device=device), persistent=False
        )
    fill()


@lru_cache(maxsize=8)
def _conversion(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift [3, 1, 1] that convert BLIP's normalisation to another one.

    They are cached, because the host waits for a copy to a GPU.
    """
    with torch.inference_mode(False):
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in BLIP_STATISTICS)
        its_mean, its_deviation = (torch.tensor(values).view(3, 1, 1) for values in statistics)
        scale, shift = deviation / its_deviation, (mean - its_mean) / its_deviation
        return scale.to(device), shift.to(device)
