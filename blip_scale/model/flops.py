"""Floating-point operations of a training step, counted on paper (2 for a multiply-add).

Matrix multiplications and attention products alone, as usual for MFU. It is what the mathematics
needs: recomputation by gradient checkpointing is not counted, nor are patches that are dropped and
the backward of frozen layers. A causal product counts whole.

Letters: B batch, N image tokens, D width, E embed_dim, Q queue, T text tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from blip_scale.model.med import MEDConfig
from blip_scale.model.packing import PackedText, Room
from blip_scale.model.text import TextConfig
from blip_scale.model.vision import VisionConfig, build_vision, training_tokens


@dataclass(frozen=True)
class _Vision:
    """One image through the ViT, forward, with the tokens that it has in training."""

    patches: float
    blocks: float
    frozen: float
    """Of `blocks`, those without a backward; the patches have none either then."""
    last_products: float
    """Of the blocks with a backward, what the last linear layer of each takes."""
    momentum: float
    """As `blocks`, in the momentum encoder, where no patch is dropped and the last block gives the
    class token alone."""
    tokens: int
    width: int

    @property
    def forward_and_backward(self) -> float:
        """Backward: twice the forward, but once where a factor has no gradient (pixels)."""
        patches = self.patches if self.frozen else 2 * self.patches
        return 3 * self.blocks - 2 * self.frozen + patches


def pretraining_flops(
    config: MEDConfig, batch_size: int, text_tokens: int, queue_size: int
) -> float:
    """FLOPs of forward and backward of one pretraining micro-step on one rank, with BLIP's momentum
    contrast.

    Args:
        config: the network.
        batch_size: pairs B.
        text_tokens: tokens T of the B captions together, [CLS] and [SEP] included. Their lengths
            are taken as equal, and the hard-negative captions as long as the others.
        queue_size: columns Q of the queue.
    """
    med = med_flops(config, batch_size, text_tokens)
    return med + momentum_contrast_flops(config, batch_size, text_tokens, queue_size)


def padded_pretraining_flops(
    config: MEDConfig, text: PackedText, room: Room, queue_size: int
) -> float:
    """As `pretraining_flops`, with all that fillers add: what a GPU computes where captions are
    filled up to static sizes.

    Args:
        config: the network.
        text: captions of a micro-step with fillers.
        room: size of the texts of ITM.
        queue_size: columns Q of the queue.
    """
    pairs, tokens = text.count, len(text.token_ids)
    texts = _Texts(pairs, tokens, text.segments.count, room.tokens)
    return _med_flops(config, texts) + _momentum_flops(config, texts, queue_size)


def med_flops(config: MEDConfig, batch_size: int, text_tokens: int, decodes: bool = True) -> float:
    """FLOPs of forward and backward of towers, projections and ITM, and of LM where the MED
    `decodes`; the contrast of the features is not counted. Arguments as of `pretraining_flops`."""
    return _med_flops(config, _Texts.unpadded(batch_size, text_tokens), decodes)


def _med_flops(config: MEDConfig, texts: _Texts, decodes: bool = True) -> float:
    part = _parts(config, texts, decodes=decodes)
    online = part.encode + part.sweep + part.heads + _projections(config, part, texts.pairs)
    return float(3 * online + texts.pairs * part.vision.forward_and_backward)


def momentum_contrast_flops(
    config: MEDConfig, batch_size: int, text_tokens: int, queue_size: int
) -> float:
    """FLOPs of the momentum encoders, and of the similarities to B + Q keys; arguments as of
    `pretraining_flops`."""
    return _momentum_flops(config, _Texts.unpadded(batch_size, text_tokens), queue_size)


def _momentum_flops(config: MEDConfig, texts: _Texts, queue_size: int) -> float:
    part, pairs = _parts(config, texts), texts.pairs
    similarity = 2 * 2 * pairs * (pairs + queue_size) * config.embed_dim
    vision = pairs * (part.vision.patches + part.vision.momentum)
    momentum = vision + part.encode + _projections(config, part, pairs)
    # Two forward products (online features and targets), and one backward: keys have no gradient.
    return float(momentum + 3 * similarity)


def _projections(config: MEDConfig, part: _Parts, pairs: int) -> float:
    return 2 * pairs * config.embed_dim * (part.vision.width + config.text.width)


def captioning_flops(config: MEDConfig, batch_size: int, text_tokens: int) -> float:
    """FLOPs of forward and backward of LM alone; arguments as of `pretraining_flops`."""
    part = _parts(config, _Texts.unpadded(batch_size, text_tokens), matches=False)
    vision = batch_size * part.vision.forward_and_backward
    return float(3 * (part.sweep + part.heads) + vision)


@dataclass(frozen=True)
class TextWork:
    """Packed text that goes through all layers of a stack, and what its cross-attention reads."""

    sequences: int
    tokens: int
    contexts: int
    """Images or other contexts, one key and value projection each."""
    context_tokens: int
    """Of all contexts together."""
    context_width: int
    cross_attentions: int = 1
    """In every layer (NLVR2 has two)."""


def fine_tuning_flops(config: MEDConfig, images: int, works: Sequence[TextWork]) -> float:
    """FLOPs of forward and backward of `images` through the ViT and of texts through stacks of
    their own. Heads that aren't one a token are left out."""
    vision = _vision_flops(config.vision)
    text = sum(_text_work(config.text, work) for work in works)
    return float(3 * text + images * vision.forward_and_backward)


def head_flops(config: MEDConfig, tokens: int) -> float:
    """FLOPs of forward and backward of the LM head."""
    text = config.text
    return float(3 * 2 * tokens * text.width * (text.width + text.vocab_size))


def _text_work(text: TextConfig, work: TextWork) -> float:
    seen = work.context_tokens / work.contexts
    project = 2 * work.context_tokens * work.context_width * 2 * text.width
    cross = project + _cross_attention(text, work.tokens, seen)
    own = _self_attention(text, work.tokens, work.tokens / work.sequences) + _mlp(text, work.tokens)
    return text.layers * (own + work.cross_attentions * cross)


def recomputation_flops(config: MEDConfig, batch_size: int, text_tokens: int) -> float:
    """FLOPs that gradient checkpointing adds to a micro-step: a forward of the ViT blocks that
    train and of the text layers; arguments as above.

    Recomputing stops at the last tensor that the backward pass needs, so the last product of each
    ViT block is spared; a text layer ends in a norm, which needs it.
    """
    part = _parts(config, _Texts.unpadded(batch_size, text_tokens))
    vision = part.vision
    blocks = batch_size * (vision.blocks - vision.frozen - vision.last_products)
    return float(blocks + part.encode + part.sweep)


@dataclass(frozen=True)
class _Texts:
    """Captions of a micro-batch, and the texts of ITM."""

    pairs: int
    tokens: int
    """Of all captions and fillers."""
    sequences: int
    """Captions and fillers."""
    matched: int
    """Tokens of ITM, fillers included."""

    @staticmethod
    def unpadded(pairs: int, tokens: int) -> _Texts:
        """Without fillers."""
        return _Texts(pairs, tokens, pairs, 3 * tokens)


@dataclass(frozen=True)
class _Parts:
    """Forward FLOPs of what has weights: of an image, and of a micro-batch's texts."""

    vision: _Vision
    encode: float
    sweep: float
    heads: float


def _parts(config: MEDConfig, texts: _Texts, matches: bool = True, decodes: bool = True) -> _Parts:
    """`matches`, `decodes`: whether the sweep holds the pairs of ITM, and the captions of LM."""
    text, vision = config.text, _vision_flops(config.vision)
    pairs, tokens, sequences = texts.pairs, texts.tokens, texts.sequences
    matched, firsts = (texts.matched, 3 * pairs) if matches else (0, 0)
    decoded = tokens - sequences if decodes else 0
    layers, trimmed = text.layers - 1, 1
    encode = text.layers * _self_attention(text, tokens, tokens / sequences)
    encode += layers * _mlp(text, tokens) + trimmed * _mlp(text, pairs)
    sweep = text.layers * (
        _self_attention(text, matched, tokens / sequences)
        + _self_attention(text, decoded, decoded / sequences)
        + 2 * pairs * vision.tokens * vision.width * 2 * text.width
    )
    for count, rows in ((layers, matched + decoded), (trimmed, firsts + decoded)):
        sweep += count * (_cross_attention(text, rows, vision.tokens) + _mlp(text, rows))
    heads = 2 * text.width * (decoded * (text.width + text.vocab_size) + firsts * 2)
    return _Parts(vision, encode, sweep, heads)


def _self_attention(text: TextConfig, tokens: float, length: float) -> float:
    return 2 * tokens * 4 * text.width**2 + 4 * tokens * length * text.width


def _cross_attention(text: TextConfig, tokens: float, image_tokens: float) -> float:
    """Keys and values of the image tokens not included."""
    return 2 * tokens * 2 * text.width**2 + 4 * tokens * image_tokens * text.width


def _mlp(text: TextConfig, tokens: float) -> float:
    return 4 * tokens * text.width * text.mlp_width


def _vision_flops(config: VisionConfig) -> _Vision:
    return _cached_vision_flops(json.dumps(asdict(config)))


@lru_cache(maxsize=8)
def _cached_vision_flops(settings: str) -> _Vision:
    config = VisionConfig(**json.loads(settings))
    with torch.device("meta"):  # sizes alone
        vision = build_vision(config)
    tokens, patches = training_tokens(vision), vision.patch_embed.num_patches
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
        frozen=frozen,
        last_products=last_products,
        momentum=_class_token_flops(vision, patches + vision.num_prefix_tokens),
        tokens=tokens,
        width=vision.embed_dim,
    )


def _class_token_flops(vision: VisionTransformer, tokens: int) -> float:
    found = sum(_block_flops(block, tokens) for block in vision.blocks)
    last = vision.blocks[-1]
    if type(last) is Block:
        unread = tokens - 1
        found -= 2 * unread * (_linear_weights(last) - last.attn.qkv.weight.numel())
        found -= 4 * unread * tokens * last.attn.attn_dim
    return found


def _block_flops(block: Block, tokens: int) -> float:
    return 2 * tokens * _linear_weights(block) + 4 * tokens**2 * block.attn.attn_dim


def _linear_weights(block: Block) -> int:
    return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
