"""Bytes of activations that a micro-step saves for backward, by formula for each layer.

On a GPU, attention is fused (FlashAttention, or SDPA's fused kernels) and saves no probabilities.
On a CPU, `model.attention` uses plain matrix products in bf16 and with dropout, which saves them.

Legend: B batch, N image tokens, D width, T text tokens, V vocabulary, K keys of ITC.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from blip_scale.model.med import MEDConfig
from blip_scale.model.text import TextConfig
from blip_scale.planning.network import VisionShape

_FP32 = 4


@dataclass(frozen=True)
class Micro:
    """Sizes of one micro-step of one rank."""

    batch: int
    text_tokens: int
    """Number of tokens of all captions, including [CLS] and [SEP]."""
    compute_bytes: int
    """Bytes per element of weights and activations."""
    keys: int
    """Number of features that ITC compares each pair with, including those of the micro-batch."""
    on_cpu: bool = False
    """Whether it runs on a CPU, where dropout masks have the dtype of the activations (1 byte on a
    GPU), and attention is not fused in bf16 or with dropout."""

    decodes: bool = True
    """Whether LM is trained."""
    matches: bool = True
    """Whether ITM is trained."""

    @property
    def decoded(self) -> int:
        """Number of tokens that LM processes."""
        return self.text_tokens - self.batch if self.decodes else 0

    @property
    def matched(self) -> int:
        """Number of tokens that ITM processes."""
        return 3 * self.text_tokens if self.matches else 0

    @property
    def dropout_bytes(self) -> int:
        """Bytes per element of a dropout mask."""
        return self.compute_bytes if self.on_cpu else 1

    @property
    def length(self) -> float:
        """Mean number of tokens of a caption."""
        return self.text_tokens / self.batch


def packed_tokens(batch: int, tokens_each: float, multiple: int = 1) -> int:
    """Number of tokens of a micro-batch's captions, padded to a multiple of `multiple`."""
    return math.ceil(math.ceil(batch * tokens_each) / multiple) * multiple


def saved_activations(
    config: MEDConfig, vision: VisionShape, micro: Micro, checkpointing: bool
) -> dict[str, float]:
    """Bytes saved between forward and backward, by part of the network.

    With checkpointing, a block saves only its input. `recomputed` is then the activations of the
    largest block, which are recomputed in the backward pass.
    """
    text, size = config.text, micro.compute_bytes
    block = _vision_block(vision, micro)
    rows, decoded = micro.matched, micro.decoded
    firsts = 3 * micro.batch if micro.matches else 0
    image_tokens = vision.tokens if rows + decoded else 0
    swept = _text_layer(text, micro, rows + decoded, rows + decoded, image_tokens)
    trimmed = _text_layer(text, micro, rows + decoded, firsts + decoded, image_tokens)
    encoded = _text_layer(text, micro, micro.text_tokens, micro.text_tokens, 0)
    encoded_last = _text_layer(text, micro, micro.text_tokens, micro.batch, 0)
    image_states = micro.batch * vision.tokens * vision.width * size
    embedding = (2 * size + _mask(text, micro)) * text.width
    if checkpointing:
        blocks = float(vision.trained_depth * image_states)
        encoder = float(text.layers * micro.text_tokens * text.width * size)
        sweep = float(text.layers * (rows + decoded) * text.width * size)
    else:
        blocks = vision.trained_depth * block
        encoder = (text.layers - 1) * encoded + encoded_last
        sweep = (text.layers - 1) * swept + trimmed
    patches_train = vision.trained_depth == vision.depth
    pixels = micro.batch * 3 * vision.image_size**2 * size if patches_train else 0
    saved = {
        "vision": pixels + blocks + 2 * image_states,  # 2: input and output of the last norm
        "text": encoder + micro.text_tokens * embedding,
        "sweep": sweep + (rows + decoded) * embedding,
        "language_head": decoded * (4 * text.width * size + text.vocab_size * _FP32),
        "contrastive": 4.0 * micro.batch * micro.keys * _FP32,
    }
    if checkpointing:
        saved["recomputed"] = max(block, swept)
    return {name: float(value) for name, value in saved.items()}


def temporaries(config: MEDConfig, vision: VisionShape, micro: Micro) -> dict[str, float]:
    """Bytes of temporary tensors at the peak, between forward and backward pass.

    The temporaries are logits and their gradients, similarities, and the gradients of one block.
    """
    text, size = config.text, micro.compute_bytes
    decoded = micro.decoded
    rows = max(micro.matched + decoded, micro.text_tokens)
    logits = decoded * text.vocab_size * (2 * _FP32 + size)
    similarities = 4 * micro.batch * micro.keys * _FP32
    wide = max(micro.batch * vision.tokens * vision.mlp_width, rows * text.mlp_width)
    return {
        "logits": float(logits),
        "similarities": float(similarities),
        "block_gradients": float(2 * wide * size),
    }


def _mask(text: TextConfig, micro: Micro) -> float:
    return micro.dropout_bytes if text.dropout else 0


def _vision_block(vision: VisionShape, micro: Micro) -> float:
    """Bytes of a ViT block: residual stream twice, norms' outputs, q k v, context, MLP twice."""
    rows = micro.batch * vision.tokens
    elements = 8 * vision.width + 2 * vision.mlp_width
    statistics = (4 + vision.heads) * _FP32
    attention = _probabilities(vision.heads * vision.tokens, 0.0, micro)
    return rows * (elements * micro.compute_bytes + statistics + attention)


def _probabilities(elements: float, dropout: float, micro: Micro) -> float:
    """Bytes of attention probabilities that unfused attention saves.

    It saves the softmax of `elements` elements and, with dropout, the mask and the product of both.
    """
    if not micro.on_cpu or (micro.compute_bytes == _FP32 and not dropout):
        return 0.0
    return elements * micro.compute_bytes * (3 if dropout else 1)


def _text_layer(
    text: TextConfig, micro: Micro, rows: int, read_rows: int, image_tokens: int
) -> float:
    """Bytes of a text layer: self-attention on `rows`, cross-attention and MLP on `read_rows`.

    Without image tokens there is no cross-attention.
    """
    size, mask = micro.compute_bytes, _mask(text, micro)
    statistics = (2 + text.heads) * _FP32
    attention = 6 * text.width * size + mask * text.width + statistics
    attention += _probabilities(text.heads * micro.length, text.dropout, micro)
    mlp = (2 * text.width + 2 * text.mlp_width) * size + mask * text.width + 2 * _FP32
    saved = rows * attention + read_rows * mlp
    if image_tokens:
        # Rows are sorted by image and back, which needs two more copies than self-attention.
        cross = 6 * text.width * size + mask * text.width + statistics
        cross += _probabilities(text.heads * image_tokens, text.dropout, micro)
        keys_and_values = micro.batch * image_tokens * 2 * text.width * size
        saved += read_rows * cross + keys_and_values
    return float(saved)
