"""Heat maps of a caption's words on an image: Grad-CAM on the cross-attention.

The value of a token at a patch is the mean over heads of `attention * max(gradient, 0)`. Here,
attention is the softmax of one cross-attention layer, and gradient is the gradient of the matching
logit (class 1 of the ITM head) with respect to it. ALBEF and LAVIS apply Grad-CAM (Selvaraju et al.
2017) to the matching score in this way. For a text stack of 12 layers, their demos use layer 8.

The text layers run fused attention kernels, which never store the probabilities. This module
computes them explicitly, but only in the layer that it needs.

Shapes: I images with one caption each, N image tokens, D width, T packed tokens, L longest caption
in tokens, H heads, C channels of a head, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip_scale.data.captions import clean_caption
from blip_scale.inference.arguments import texts_of
from blip_scale.inference.blip import Blip
from blip_scale.model.attention import Segments
from blip_scale.model.packing import ImageIndex, PackedText, plan_pass
from blip_scale.model.text import CrossAttention, TextLayer

if TYPE_CHECKING:
    from transformers import BatchEncoding


@dataclass(frozen=True)
class WordMaps:
    """Heat maps of the words of one caption on its image."""

    text: str
    """Caption, cleaned as in training."""
    probability: float
    """Matching probability of image and caption."""
    words: list[str]
    """Words in the order of the caption, without punctuation."""
    maps: Tensor
    """Fp32 [W, rows, columns] on the CPU, one value per patch, at least 0, not normalised."""

    @property
    def mean(self) -> Tensor:
        """Mean map of all words, [rows, columns]."""
        return self.maps.mean(0)


def word_maps(blip: Blip, image_embeds: Tensor, captions: str | Sequence[str]) -> list[WordMaps]:
    """Compute the maps of all words, for one caption per image.

    The map of a word with several tokens is the mean of their maps.

    Args:
        blip: checkpoint that supports matching.
        image_embeds: [I, N, D] from `Blip.image_embeds`.
        captions: I captions, or a single str for one image.

    Raises:
        ValueError: the checkpoint does not support matching, its text stack has only one layer, a
            caption holds no word, or there is not one caption for each image.
    """
    blip.require("match")
    blip.check_tokens(image_embeds)
    captions = texts_of(captions, "captions")
    if len(captions) != len(image_embeds):
        raise ValueError(f"captions: {len(captions)} for {len(image_embeds)} images; give one each")
    if not captions:
        return []
    number = explained_layer(len(blip.med.text.layers))
    texts = [clean_caption(caption) for caption in captions]
    encoding = blip.tokenized(texts)
    words_of = [_words(encoding, index, text) for index, text in enumerate(texts)]
    for caption, placed_words in zip(captions, words_of, strict=True):
        if not placed_words:
            raise ValueError(f"the caption {caption!r} holds no word; give one with words")
    packed = PackedText.from_lists(encoding["input_ids"], blip.device)
    packed = packed.with_first_token(blip.med.config.text.special.enc)
    # Autograd cannot save tensors that were created in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        logits, attention_IHLN = _match(blip, packed, image_embeds.clone(), number)
        (gradient_IHLN,) = torch.autograd.grad(logits[:, 1].sum(), attention_IHLN)
    values_ILN = (attention_IHLN.detach() * gradient_IHLN.clamp(min=0)).mean(1)
    rows, columns = blip.network.vision.patch_embed.grid_size
    patches_ILN = values_ILN[:, :, -rows * columns :].unflatten(-1, (rows, columns)).cpu()
    probabilities = logits.detach().float().softmax(-1)[:, 1].tolist()
    results = []
    for index, text in enumerate(texts):
        words = [word for word, _ in words_of[index]]
        maps = torch.stack([patches_ILN[index, tokens].mean(0) for _, tokens in words_of[index]])
        results.append(WordMaps(text, probabilities[index], words, maps))
    return results


def _words(encoding: BatchEncoding, index: int, text: str) -> list[tuple[str, list[int]]]:
    """List the words of caption `index` with the positions of their tokens, no punctuation."""
    places: dict[int, list[int]] = {}
    for place, word in enumerate(encoding.word_ids(index)):
        if word is not None:
            places.setdefault(word, []).append(place)
    words = []
    for word, tokens in places.items():
        span = encoding.word_to_chars(index, word)
        letters = text[span.start : span.end]
        if any(letter.isalnum() for letter in letters):
            words.append((letters, tokens))
    return words


def explained_layer(layers: int) -> int:
    """Return the index, counted from 1, of the cross-attention layer to read: 8 of 12.

    Other depths use the same fraction.

    Raises:
        ValueError: there is only one layer. The matching score reads only the first token of the
            last layer, so the words of this layer have no gradient.
    """
    if layers < 2:
        raise ValueError(
            "the text stack has a single layer; maps of words need two or more, because the "
            "matching score reads only the first token of the last one"
        )
    return max(1, layers * 2 // 3)


def explicit_cross_attention(
    layer: CrossAttention, hidden_TD: Tensor, image_embeds_IND: Tensor, queries: Segments
) -> tuple[Tensor, Tensor]:
    """Compute the evaluation output of `layer`, and its attention probabilities.

    Args:
        layer: cross-attention in evaluation mode.
        hidden_TD: [T, D].
        image_embeds_IND: [I, N, image width].
        queries: I sequences in order. Sequence i attends to image i.

    Returns:
        Output [T, D], and probabilities fp32 [I, H, L, N], which are a leaf of the output's graph.
        Rows after the end of a caption are pads, whose gradient is 0.
    """
    images, tokens, _ = image_embeds_IND.shape
    q_THC = layer.query(hidden_TD).unflatten(-1, (layer.heads, -1))
    k, v = layer.project_images(image_embeds_IND)
    k_IHNC = k.unflatten(0, (images, tokens)).transpose(1, 2)
    v_IHNC = v.unflatten(0, (images, tokens)).transpose(1, 2)
    scores = queries.pad(q_THC).transpose(1, 2) @ k_IHNC.transpose(-1, -2)
    scores = scores.float() * q_THC.shape[-1] ** -0.5
    probabilities = scores.softmax(-1).detach().requires_grad_()
    context_IHLC = probabilities.to(v_IHNC.dtype) @ v_IHNC
    context_THC = queries.unpad(context_IHLC.transpose(1, 2), len(hidden_TD))
    attended_TD = layer.output(context_THC.flatten(1))
    return layer.norm(hidden_TD + layer.dropout(attended_TD)), probabilities


def _match(
    blip: Blip, text: PackedText, image_embeds: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """Compute `MED.match` of caption i and image i, with layer `number` computed explicitly.

    Returns:
        Logits [I, 2], and the attention probabilities of this layer, fp32 [I, H, L, N].
    """
    med = blip.med
    index = torch.arange(len(image_embeds), device=image_embeds.device)
    images = ImageIndex(len(image_embeds), image_embeds.shape[1], encoder=index)
    plan = plan_pass(text, None, images, med.config.takes_packed(image_embeds))
    assert plan.encoder is not None
    hidden_TD = med.text.embeddings(plan.token_ids, plan.positions)
    attention = hidden_TD.new_empty(0)
    for at, layer in enumerate(med.text.layers, start=1):
        assert isinstance(layer, TextLayer)
        if at == number:
            hidden_TD = layer.self_attention_encoder(hidden_TD, plan.encoder)
            hidden_TD, attention = explicit_cross_attention(
                layer.cross_attention, hidden_TD, image_embeds, text.segments
            )
            hidden_TD = layer.mlp(hidden_TD)
        else:
            hidden_TD = layer(hidden_TD, image_embeds, plan, at == len(med.text.layers))
    return med.itm_head(hidden_TD), attention
