"""Floating-point operations of a training step, by formula (2 for a multiply-add).

As usual for MFU, count only the matrix multiplications and attention products that the model
requires. Recomputation by gradient checkpointing, dropped patches and the backward of frozen ViT
blocks are not counted. A causal product counts as a full one. LoRA and a frozen text stack count as
if all weights were trained, so MFU reads too high.

Letters: B batch, N image tokens, D width, E embed_dim, Q queue, T text tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from blip_scale.model.med import MEDConfig
from blip_scale.model.packing import PackedText, Room
from blip_scale.model.text import TextConfig
from blip_scale.model.towers import ImageTower
from blip_scale.model.vision import VisionConfig, build_vision, training_tokens


@dataclass(frozen=True)
class _Vision:
    """Forward FLOPs of one image through the ViT, after patch dropout."""

    patches: float
    """Patch embedding."""
    blocks: float
    """All blocks."""
    pooling: float
    """Attention pooling, if the tower has one."""
    frozen: float
    """Blocks without a backward. If there are any, the patch embedding has no backward either."""
    last_products: float
    """Last linear layers of the blocks that have a backward."""
    momentum: float
    """All blocks of the momentum encoder. It drops no patches, and its last block computes only the
    class token."""
    tokens: int
    """Number of tokens that the tower returns."""
    width: int

    @property
    def forward_and_backward(self) -> float:
        """FLOPs of forward and backward.

        A backward costs two forwards, but only one for the patch embedding: pixels have no
        gradient.
        """
        patches = self.patches if self.frozen else 2 * self.patches
        return 3 * (self.blocks + self.pooling) - 2 * self.frozen + patches


def pretraining_flops(
    config: MEDConfig, batch_size: int, text_tokens: int, queue_size: int
) -> float:
    """Count the FLOPs of one pretraining micro-step on one rank, with BLIP's momentum contrast.

    The result includes forward and backward.

    Args:
        config: the network.
        batch_size: number of pairs B.
        text_tokens: number of tokens T of all B captions, including [CLS] and [SEP]. All captions
            and hard negatives are assumed to be equally long.
        queue_size: number of columns Q of the queue.
    """
    med = med_flops(config, batch_size, text_tokens)
    return med + momentum_contrast_flops(config, batch_size, text_tokens, queue_size)


def padded_pretraining_flops(
    config: MEDConfig, text: PackedText, room: Room, queue_size: int
) -> float:
    """Count the FLOPs of `pretraining_flops` including all fillers.

    This is the work of the GPU when captions are padded to static sizes.

    Args:
        config: the network.
        text: captions of a micro-step, with fillers.
        room: static size of ITM's texts.
        queue_size: number of columns Q of the queue.
    """
    pairs, tokens = text.count, len(text.token_ids)
    texts = _Texts(pairs, tokens, text.segments.count, room.tokens)
    return _med_flops(config, texts) + _momentum_flops(config, texts, queue_size)


def at_image_size(config: MEDConfig, image_size: int) -> MEDConfig:
    """Return the settings of the network at another image size, to count its FLOPs."""
    vision = replace(config.vision, image_size=image_size, other_sizes=())
    return replace(config, vision=vision)


def med_flops(
    config: MEDConfig,
    batch_size: int,
    text_tokens: int,
    decodes: bool = True,
    matches: bool = True,
) -> float:
    """Count the FLOPs of forward and backward of towers, projections, ITM and LM.

    The contrastive similarities are not included.

    Args:
        config: the network.
        batch_size: number of pairs.
        text_tokens: number of tokens of all captions; see `pretraining_flops`.
        decodes: whether LM is computed.
        matches: whether ITM is computed.
    """
    return _med_flops(config, _Texts.unpadded(batch_size, text_tokens), decodes, matches)


def _med_flops(
    config: MEDConfig, texts: _Texts, decodes: bool = True, matches: bool = True
) -> float:
    part = _parts(config, texts, matches, decodes)
    online = part.encode + part.sweep + part.heads + _projections(config, part, texts.pairs)
    return float(3 * online + texts.pairs * part.vision.forward_and_backward)


def momentum_contrast_flops(
    config: MEDConfig, batch_size: int, text_tokens: int, queue_size: int
) -> float:
    """Count the FLOPs of the momentum encoders and of the similarities to B + Q keys.

    See `pretraining_flops` for the arguments.
    """
    return _momentum_flops(config, _Texts.unpadded(batch_size, text_tokens), queue_size)


def _momentum_flops(config: MEDConfig, texts: _Texts, queue_size: int) -> float:
    part, pairs = _parts(config, texts), texts.pairs
    similarity = 2 * 2 * pairs * (pairs + queue_size) * config.embed_dim
    vision = pairs * (part.vision.patches + part.vision.momentum + part.vision.pooling)
    momentum = vision + part.encode + _projections(config, part, pairs)
    # Two forwards (online features, targets) and one backward: keys have no gradient.
    return float(momentum + 3 * similarity)


def _projections(config: MEDConfig, part: _Parts, pairs: int) -> float:
    return 2 * pairs * config.embed_dim * (part.vision.width + config.text.width)


def captioning_flops(config: MEDConfig, batch_size: int, text_tokens: int) -> float:
    """Count the FLOPs of forward and backward of ViT and LM. See `pretraining_flops`."""
    part = _parts(config, _Texts.unpadded(batch_size, text_tokens), matches=False)
    vision = batch_size * part.vision.forward_and_backward
    return float(3 * (part.sweep + part.heads) + vision)


@dataclass(frozen=True)
class TextWork:
    """Sizes of packed text that passes all layers of a stack, and of the contexts it attends to."""

    sequences: int
    tokens: int
    contexts: int
    """Number of images or other contexts. Each is projected to keys and values once."""
    context_tokens: int
    """Total number of tokens of all contexts."""
    context_width: int
    cross_attentions: int = 1
    """Number of cross-attentions in every layer (NLVR2 has two)."""


def fine_tuning_flops(config: MEDConfig, images: int, works: Sequence[TextWork]) -> float:
    """Count the FLOPs of forward and backward of `images` in the ViT and of texts in their stacks.

    Heads that read one token of a text are not counted.
    """
    vision = _vision_flops(config.vision)
    text = sum(_text_work(config.text, work) for work in works)
    return float(3 * text + images * vision.forward_and_backward)


def head_flops(config: MEDConfig, tokens: int) -> float:
    """Count the FLOPs of forward and backward of the LM head."""
    text = config.text
    return float(3 * 2 * tokens * text.width * (text.width + text.vocab_size))


def _text_work(text: TextConfig, work: TextWork) -> float:
    seen = work.context_tokens / work.contexts
    project = 2 * work.context_tokens * work.context_width * 2 * text.width
    cross = project + _cross_attention(text, work.tokens, seen)
    alone = _self_attention(text, work.tokens, work.tokens / work.sequences)
    alone += _mlp(text, work.tokens)
    return text.layers * (alone + work.cross_attentions * cross)


def recomputation_flops(
    config: MEDConfig,
    batch_size: int,
    text_tokens: int,
    decodes: bool = True,
    matches: bool = True,
) -> float:
    """Count the FLOPs that gradient checkpointing adds to a micro-step.

    It repeats the forward of the trained ViT blocks and of the text layers. Recomputation stops at
    the last tensor that the backward needs, so it omits the last product of each ViT block. A text
    layer ends in a norm, whose backward needs this product. See `med_flops` for the arguments.
    """
    part = _parts(config, _Texts.unpadded(batch_size, text_tokens), matches, decodes)
    vision = part.vision
    blocks = batch_size * (vision.blocks - vision.frozen - vision.last_products)
    return float(blocks + part.encode + part.sweep)


@dataclass(frozen=True)
class _Texts:
    """Sizes of the captions of a micro-batch and of ITM's texts."""

    pairs: int
    """Number of captions without fillers."""
    tokens: int
    """Number of tokens of captions and fillers."""
    sequences: int
    """Number of captions and fillers."""
    matched: int
    """Number of tokens of ITM's texts, including fillers."""

    @staticmethod
    def unpadded(pairs: int, tokens: int) -> _Texts:
        """Return the sizes without fillers."""
        return _Texts(pairs, tokens, pairs, 3 * tokens)


@dataclass(frozen=True)
class _Parts:
    """Forward FLOPs of the modules that have weights: `vision` per image, the others in total."""

    vision: _Vision
    encode: float
    sweep: float
    heads: float


def _parts(config: MEDConfig, texts: _Texts, matches: bool = True, decodes: bool = True) -> _Parts:
    """Count the FLOPs. `matches` and `decodes` tell whether the sweep includes ITM and LM."""
    text, vision = config.text, _vision_flops(config.vision)
    pairs, tokens, sequences = texts.pairs, texts.tokens, texts.sequences
    matched, firsts = (texts.matched, 3 * pairs) if matches else (0, 0)
    decoded = tokens - sequences if decodes else 0
    read = matches or decodes  # whether image tokens are projected to keys and values
    layers, trimmed = text.layers - 1, 1
    encode = text.layers * _self_attention(text, tokens, tokens / sequences)
    encode += layers * _mlp(text, tokens) + trimmed * _mlp(text, pairs)
    sweep = text.layers * (
        _self_attention(text, matched, tokens / sequences)
        + _self_attention(text, decoded, decoded / sequences)
        + read * 2 * pairs * vision.tokens * vision.width * 2 * text.width
    )
    for count, rows in ((layers, matched + decoded), (trimmed, firsts + decoded)):
        sweep += count * (_cross_attention(text, rows, vision.tokens) + _mlp(text, rows))
    heads = 2 * text.width * (decoded * (text.width + text.vocab_size) + firsts * 2)
    return _Parts(vision, encode, sweep, heads)


def _self_attention(text: TextConfig, tokens: float, length: float) -> float:
    return 2 * tokens * 4 * text.width**2 + 4 * tokens * length * text.width


def _cross_attention(text: TextConfig, tokens: float, image_tokens: float) -> float:
    """Count the FLOPs of a cross-attention, except the keys' and values' projection."""
    return 2 * tokens * 2 * text.width**2 + 4 * tokens * image_tokens * text.width


def _mlp(text: TextConfig, tokens: float) -> float:
    return 4 * tokens * text.width * text.mlp_width


def _vision_flops(config: VisionConfig) -> _Vision:
    return _cached_vision_flops(json.dumps(asdict(config)))


@lru_cache(maxsize=8)
def _cached_vision_flops(settings: str) -> _Vision:
    config = VisionConfig(**json.loads(settings))
    with torch.device("meta"):  # parameters have sizes, but no memory
        vision = build_vision(config)
    returned, patches = training_tokens(vision), vision.patch_embed.num_patches
    tokens = returned - vision.added_tokens
    frozen = last_products = 0.0
    for block in vision.blocks:
        if next(block.parameters()).requires_grad:
            last_products += 2 * tokens * block.mlp.fc2.weight.numel()
        else:
            frozen += _block_flops(block, tokens)
    kernel = vision.patch_embed.proj.weight.numel()
    return _Vision(
        patches=2.0 * patches * kernel,
        blocks=sum(_block_flops(block, tokens) for block in vision.blocks),
        pooling=_pooling_flops(vision, tokens),
        frozen=frozen,
        last_products=last_products,
        momentum=_momentum_blocks(vision, patches + vision.num_prefix_tokens),
        tokens=returned,
        width=vision.embed_dim,
    )


def _momentum_blocks(vision: ImageTower, tokens: int) -> float:
    flops = sum(_block_flops(block, tokens) for block in vision.blocks)
    last = vision.blocks[-1]
    if vision.pools_by_class_token and type(last) is Block:
        unread = tokens - 1
        flops -= 2 * unread * (_linear_weights(last) - last.attn.qkv.weight.numel())
        flops -= 4 * unread * tokens * last.attn.proj.in_features
    return flops


def _pooling_flops(vision: ImageTower, tokens: int) -> float:
    """Count keys and values of all tokens, and one query with its MLP."""
    pool = getattr(vision, "attn_pool", None)
    if pool is None:
        return 0.0
    keys_and_values = pool.kv.weight.numel()
    query = _linear_weights(pool) - keys_and_values
    return float(2 * tokens * keys_and_values + 2 * query + 4 * tokens * vision.embed_dim)


def _block_flops(block: Any, tokens: int) -> float:
    return 2.0 * tokens * _linear_weights(block) + 4 * tokens**2 * block.attn.proj.in_features


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
