"""Held-out pairs through a MED: retrieval figures, and captions to look at.

Legend: I images, S texts, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip_scale import data
from blip_scale.engine import collectives
from blip_scale.engine.pictures import Panel
from blip_scale.engine.task import Evaluation
from blip_scale.model import MED, BeamSettings, PackedText, caption_beam
from blip_scale.recipe import Recipe
from blip_scale.tasks import retrieval
from blip_scale.tasks.networks import normalize_images


@torch.no_grad()
def evaluate(
    med: MED, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, final: bool
) -> Evaluation:
    """Zero-shot retrieval on every held-out set, and captions of the first images of each.

    Args:
        med: whole network on this rank's device, in evaluation mode; the same on all ranks.
        final: re-rank with image-text matching too, which costs top_k forwards for each image
            and each text.
    """
    scalars: dict[str, float] = {}
    panels: dict[str, list[Panel]] = {}
    captions: list[dict[str, str]] = []
    for stream in recipe.data.heldout:
        pairs = data.heldout_pairs(
            stream, recipe.model.vision.image_size, recipe.data, recipe.evaluation.max_pairs
        )
        texts = _Texts(list(chain.from_iterable(pairs.captions)), recipe, tokenizer, med)
        owners_S = _owners(pairs)
        features = _encode(med, pairs, texts, recipe.evaluation.batch_size)
        similarity = features.image_features @ features.text_features.T
        reranked = None
        if final:
            settings = recipe.evaluation
            reranked = retrieval.rerank(
                med, features, texts.matching, settings.rerank_top_k, settings.batch_size
            )
        figures = retrieval.retrieval_figures(similarity, reranked, owners_S)
        scalars |= {f"{stream.name}/{name}": value for name, value in figures.items()}
        panels[stream.name] = _caption(med, pairs, recipe, tokenizer)
        captions += [
            {"set": stream.name, "id": pairs.ids[i], "caption": panel.caption, "truth": panel.truth}
            for i, panel in zip(_shown(len(pairs), recipe), panels[stream.name], strict=True)
        ]
    return Evaluation(scalars, panels, captions)


def _owners(pairs: data.HeldoutPairs) -> Tensor:
    """[S] int64: the image that each text belongs to."""
    return torch.arange(len(pairs)).repeat_interleave(
        torch.tensor([len(captions) for captions in pairs.captions])
    )


class _Texts:
    """Tokenized held-out captions."""

    def __init__(
        self, captions: Sequence[str], recipe: Recipe, tokenizer: PreTrainedTokenizerFast, med: MED
    ) -> None:
        limit = recipe.model.text.max_tokens
        self._token_ids = tokenizer(list(captions), truncation=True, max_length=limit)["input_ids"]
        self.count = len(captions)
        self._device = med.vision_proj.weight.device
        self._enc = med.config.text.special.enc

    def plain(self, indices: Sequence[int]) -> PackedText:
        """[CLS] first, for the unimodal encoder."""
        return PackedText.from_lists([self._token_ids[i] for i in indices], self._device)

    def matching(self, indices: Sequence[int]) -> PackedText:
        """[ENC] first, for image-text matching."""
        return self.plain(indices).with_first_token(self._enc)


def _encode(
    med: MED, pairs: data.HeldoutPairs, texts: _Texts, batch_size: int
) -> retrieval.PairFeatures:
    """Features of all images and texts on every rank; each rank encodes its share."""
    like = med.vision_proj.weight
    embeds, images, sentences = [], [], []
    for indices in _my_batches(len(pairs), batch_size):
        image_embeds = med.encode_image(
            normalize_images(pairs.images(indices).to(like.device), like.dtype)
        )
        embeds.append(image_embeds)
        images.append(med.project_image(image_embeds))
    for indices in _my_batches(texts.count, batch_size):
        sentences.append(med.project_text(med.encode_text(texts.plain(indices))))
    gathered = [
        torch.cat(collectives.all_gather_ragged(torch.cat(parts)))
        for parts in (embeds, images, sentences)
    ]
    return retrieval.PairFeatures(*gathered)


def _my_batches(count: int, batch_size: int) -> Iterator[range]:
    """This rank's share of `count` items, in batches."""
    mine = range(*retrieval.share(count).indices(count))
    for begin in range(0, len(mine), batch_size):
        yield mine[begin : begin + batch_size]


def _shown(count: int, recipe: Recipe) -> list[int]:
    """Images of the panel, evenly over the set."""
    shown = min(recipe.evaluation.captions, count)
    return [index * count // shown for index in range(shown)]


def _caption(
    med: MED, pairs: data.HeldoutPairs, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> list[Panel]:
    """Beam-search captions of the panel's images; every rank makes the same."""
    settings = recipe.evaluation
    shown = _shown(len(pairs), recipe)
    if not shown:
        return []
    images = pairs.images(shown)
    like = med.vision_proj.weight
    image_embeds = med.encode_image(normalize_images(images.to(like.device), like.dtype))
    beam = BeamSettings(
        num_beams=settings.num_beams,
        max_length=settings.max_caption_tokens,
        min_length=settings.min_caption_tokens,
    )
    sequences = caption_beam(med, image_embeds, [med.config.text.special.dec], beam)
    said = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    return [
        Panel(image, caption, pairs.captions[index][0])
        for image, caption, index in zip(images, said, shown, strict=True)
    ]
