"""Zero-shot classification as in CLIP: cosine to the mean feature of each class's prompts.

Legend: I images, C classes, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip_scale.config.recipe import Recipe
from blip_scale.data.captions import clean_caption
from blip_scale.data.heldout.classes import fill_template
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.engine import collectives
from blip_scale.evaluation.captions_and_pairs import Texts, my_batches
from blip_scale.inference.inputs import to_pixels
from blip_scale.model.med import MED


@torch.no_grad()
def class_features(
    med: MED,
    names: Sequence[str],
    templates: Sequence[str],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
) -> Tensor:
    """Compute features of classes, [C, E], L2-normalised, equal on all ranks.

    The feature of a class is the mean over all templates (prompt ensembling).
    """
    prompts = [fill_template(template, name) for name, template in product(names, templates)]
    texts = Texts([clean_caption(prompt) for prompt in prompts], recipe, tokenizer, med)
    features = []
    for indices in my_batches(texts.count, recipe.evaluation.batch_size):
        features.append(med.project_text(med.encode_text(texts.plain(indices))))
    every = torch.cat(collectives.all_gather_ragged(_joined(features, med)))
    means = every.unflatten(0, (len(names), len(templates))).mean(dim=1)
    return F.normalize(means, dim=-1)


@torch.no_grad()
def class_scores(med: MED, pairs: HeldoutPairs, classes_CE: Tensor, batch_size: int) -> Tensor:
    """Compute the cosines of all images and classes, [I, C], equal on all ranks."""
    features = []
    for indices in my_batches(len(pairs), batch_size):
        image_embeds = med.encode_image(to_pixels(pairs.images(indices), med))
        features.append(med.project_image(image_embeds))
    return torch.cat(collectives.all_gather_ragged(_joined(features, med))) @ classes_CE.T


def classification_figures(scores_IC: Tensor, labels_I: Tensor) -> dict[str, float]:
    """Compute `top1`, `top5` and `mean_per_class` accuracy.

    `mean_per_class` is the mean of the per-class `top1` over the classes that have images. A tie
    counts against the right class, and so does a NaN.
    """
    labels_I = labels_I.to(scores_IC.device)
    right_I1 = scores_IC.gather(1, labels_I[:, None])
    better_I = (~(scores_IC < right_I1)).sum(dim=1) - 1  # do not count the right class itself
    is_first_I = (better_I < 1).double()
    counts_C = labels_I.bincount(minlength=scores_IC.shape[1])
    firsts_C = labels_I.bincount(is_first_I, minlength=scores_IC.shape[1])
    has_images_C = counts_C > 0
    shares = (firsts_C / counts_C)[has_images_C]
    return {
        "top1": is_first_I.mean().item(),
        "top5": (better_I < 5).double().mean().item(),
        "mean_per_class": shares.mean().item(),
    }


def _joined(features: list[Tensor], med: MED) -> Tensor:
    """Concatenate the features of this rank's batches; a rank may have none."""
    nothing = torch.empty(0, med.config.embed_dim, device=next(med.parameters()).device)
    return torch.cat([nothing, *features])
