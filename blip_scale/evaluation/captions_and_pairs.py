"""Evaluation of a MED on held-out pairs: retrieval metrics, and example captions.

Legend: I images, S texts, N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip_scale.config.recipe import Recipe
from blip_scale.data.captions import Clean, clean_caption
from blip_scale.data.heldout.pairs import HeldoutPairs, heldout_pairs
from blip_scale.data.tokenizer import prompt_ids
from blip_scale.engine import collectives
from blip_scale.engine.task import Evaluation
from blip_scale.engine.watching.batches import beating
from blip_scale.engine.watching.pictures import Panel
from blip_scale.evaluation import retrieval
from blip_scale.inference.inputs import to_pixels
from blip_scale.model.generation import BeamSettings, caption_beam
from blip_scale.model.med import MED
from blip_scale.model.packing import PackedText


@torch.no_grad()
def evaluate(
    med: MED, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, final: bool
) -> Evaluation:
    """Evaluate zero-shot retrieval on all held-out sets, and caption some images of each.

    Without LM there are no captions. Without ITM, nothing is re-ranked or matched.

    Args:
        med: whole network on this rank's device, in evaluation mode; equal on all ranks.
        recipe: recipe with the held-out sets and settings.
        tokenizer: the network's tokenizer.
        final: whether to re-rank by image-text matching, which costs top_k forwards for each image
            and each text. Also caption all images for the share `exact`, unless
            `evaluation.captions` is 0, and sort the captions by their matching probability `match`.
    """
    result = Evaluation()
    matches = recipe.objective.itm != "none"
    for name, pairs in heldout_sets(recipe):
        figures = retrieval_on(med, pairs, recipe, tokenizer, with_matching=final and matches)
        if recipe.objective.lm == "none":
            result = result.with_set(name, figures)
            continue
        shown = shown_images(len(pairs), recipe)
        captioned = range(len(pairs)) if final and shown else shown
        captions = captions_of(med, pairs, captioned, recipe, tokenizer)
        written = dict(zip(captioned, captions, strict=True))
        panels, entries = panels_of(name, pairs, shown, [written[image] for image in shown])
        if final and shown:
            is_exact = exactly_right(captions, pairs.captions, tokenizer)
            figures["exact"] = sum(is_exact) / len(is_exact)
            for entry, image in zip(entries, shown, strict=True):
                entry["exact"] = is_exact[image]
        if final and shown and matches:
            probabilities = match_probabilities(med, pairs, shown, written, recipe, tokenizer)
            pictures = zip(probabilities, panels, entries, strict=True)
            surest_first = sorted(pictures, key=lambda picture: -picture[0])
            panels = [panel for _, panel, _ in surest_first]
            entries = [entry | {"match": match} for match, _, entry in surest_first]
        result = result.with_set(name, figures, panels=panels, captions=entries)
    return result


def heldout_sets(
    recipe: Recipe, clean: Clean = clean_caption, max_words: int = 30
) -> Iterator[tuple[str, HeldoutPairs]]:
    """Yield the recipe's held-out sets by name, with cleaned texts."""
    size, most = recipe.model.vision.image_size, recipe.evaluation.max_pairs
    for stream in recipe.data.heldout:
        pairs = heldout_pairs(stream, size, recipe.data, most, clean, max_words)
        yield stream.name, pairs


def retrieval_on(
    med: MED,
    pairs: HeldoutPairs,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    with_matching: bool,
) -> dict[str, float]:
    """Compute the recalls on a set (`retrieval.retrieval_figures`). Call it on all ranks.

    `with_matching` adds the recalls of re-ranked candidates.
    """
    similarity, reranked = scores_on(med, pairs, recipe, tokenizer, with_matching)
    return retrieval.retrieval_figures(similarity, reranked, owners_of(pairs.captions))


@torch.no_grad()
def scores_on(
    med: MED,
    pairs: HeldoutPairs,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    with_matching: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the cosines [I, S] of a set's images and texts, and the scores of `retrieval.rerank`.

    Both are equal on all ranks.
    """
    settings = recipe.evaluation
    texts = Texts(list(chain.from_iterable(pairs.captions)), recipe, tokenizer, med)
    features = _encode(med, pairs, texts, settings.batch_size)
    similarity = features.image_features @ features.text_features.T
    reranked = None
    if with_matching:
        reranked = retrieval.rerank(
            med, features, texts.matching, settings.rerank_top_k, settings.batch_size
        )
    return similarity, reranked


def owners_of(captions: Sequence[Sequence[str]]) -> Tensor:
    """Return the image of each text, [S] int64, from the captions of every image."""
    return torch.arange(len(captions)).repeat_interleave(torch.tensor([*map(len, captions)]))


class Texts:
    """Tokenized held-out captions."""

    def __init__(
        self, captions: Sequence[str], recipe: Recipe, tokenizer: PreTrainedTokenizerFast, med: MED
    ) -> None:
        limit = recipe.model.text.max_tokens
        self._token_ids = tokenizer(list(captions), truncation=True, max_length=limit)["input_ids"]
        self.count = len(captions)
        self._device = next(med.parameters()).device
        self._enc = med.config.text.special.enc

    def plain(self, indices: Sequence[int]) -> PackedText:
        """Pack texts for the unimodal encoder. The first token is [CLS]."""
        return PackedText.from_lists([self._token_ids[i] for i in indices], self._device)

    def matching(self, indices: Sequence[int]) -> PackedText:
        """Pack texts for image-text matching. The first token is [ENC]."""
        return self.plain(indices).with_first_token(self._enc)


def _encode(med: MED, pairs: HeldoutPairs, texts: Texts, batch_size: int) -> retrieval.PairFeatures:
    """Compute features of all images and texts, and the image tokens of this rank's share.

    Each rank encodes its share.
    """
    embeds, images, sentences = [], [], []
    for indices in my_batches(len(pairs), batch_size):
        image_embeds = med.encode_image(to_pixels(pairs.images(indices), med))
        embeds.append(image_embeds)
        images.append(med.project_image(image_embeds))
    for indices in my_batches(texts.count, batch_size):
        sentences.append(med.project_text(med.encode_text(texts.plain(indices))))
    return gathered_features(med, embeds, images, sentences)


def gathered_features(
    med: MED, embeds: list[Tensor], images: list[Tensor], sentences: list[Tensor]
) -> retrieval.PairFeatures:
    """Gather the features of all ranks, from the batches that each rank encoded.

    A rank has no batch if there are fewer images than ranks.
    """
    no_features = torch.empty(0, med.config.embed_dim, device=next(med.parameters()).device)
    image_features = torch.cat([no_features, *images])
    text_features = torch.cat([no_features, *sentences])
    return retrieval.PairFeatures(
        torch.cat(embeds) if embeds else no_features,
        torch.cat(collectives.all_gather_ragged(image_features)),
        torch.cat(collectives.all_gather_ragged(text_features)),
    )


def my_batches(count: int, batch_size: int) -> Iterator[range]:
    """Yield this rank's share of `count` items, in batches."""
    items = range(*retrieval.share(count).indices(count))
    for begin in beating(range(0, len(items), batch_size)):
        yield items[begin : begin + batch_size]


def shown_images(count: int, recipe: Recipe) -> list[int]:
    """Select the images to show, spread evenly over the set."""
    shown = min(recipe.evaluation.captions, count)
    return [index * count // shown for index in range(shown)]


@torch.no_grad()
def captions_of(
    med: MED,
    pairs: HeldoutPairs,
    images: Sequence[int],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
) -> list[str]:
    """Caption images by beam search, without the prompt. The work is divided among the ranks."""
    settings = recipe.evaluation
    beam = BeamSettings(
        num_beams=settings.num_beams,
        max_length=settings.max_caption_tokens,
        min_length=settings.min_caption_tokens,
        repetition_penalty=settings.repetition_penalty,
        scoring=settings.scoring,
    )
    prompt = prompt_ids(recipe.model.text.prompt, tokenizer)
    captions: list[str] = []
    for places in my_batches(len(images), settings.batch_size):
        pixels = pairs.images(images[place] for place in places)
        embeds = med.encode_image(to_pixels(pixels, med))
        sequences = caption_beam(med, embeds, prompt, beam)
        captions += tokenizer.batch_decode(sequences, skip_special_tokens=True)
    return list(chain.from_iterable(collectives.all_gather_objects(captions)))


def exactly_right(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerFast,
) -> list[bool]:
    """Whether each caption equals a reference of its image, compared by word pieces."""
    right = []
    for caption, truths in zip(captions, references, strict=True):
        token_ids = tokenizer([caption, *truths])["input_ids"]
        right.append(token_ids[0] in token_ids[1:])
    return right


@torch.no_grad()
def match_probabilities(
    med: MED,
    pairs: HeldoutPairs,
    images: Sequence[int],
    captions: Mapping[int, str],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
) -> list[float]:
    """Compute the matching probability of each image and its caption, rounded to three digits.

    `captions` maps images to captions. The work is divided among the ranks.
    """
    texts = Texts([captions[image] for image in images], recipe, tokenizer, med)
    share: list[float] = []
    for places in my_batches(len(images), recipe.evaluation.batch_size):
        pixels = pairs.images(images[place] for place in places)
        embeds = med.encode_image(to_pixels(pixels, med))
        every = torch.arange(len(places), device=embeds.device)
        logits = med.match(texts.matching(places), embeds, every)
        share += logits.float().softmax(dim=1)[:, 1].tolist()
    gathered = chain.from_iterable(collectives.all_gather_objects(share))
    return [round(probability, 3) for probability in gathered]


def panels_of(
    name: str,
    pairs: HeldoutPairs,
    images: Sequence[int],
    texts: Sequence[str],
    truths: Sequence[str] | None = None,
) -> tuple[list[Panel], list[dict[str, Any]]]:
    """Make pictures with generated texts, and their entries in summary.json.

    Args:
        name: name of the held-out set.
        pairs: the held-out set.
        images: indices of the images to show.
        texts: generated text of each image.
        truths: right text of each image. None: its first caption.
    """
    if truths is None:
        truths = [pairs.captions[index][0] for index in images]
    panels: list[Panel] = []
    entries: list[dict[str, Any]] = []
    pictures = pairs.images(images) if images else ()
    for index, image, text, truth in zip(images, pictures, texts, truths, strict=True):
        panels.append(Panel(image, text, truth))
        entries.append({"set": name, "id": pairs.ids[index], "caption": text, "truth": truth})
    return panels, entries
