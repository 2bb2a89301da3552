"""Zero-shot image-text retrieval by cosine similarity, re-ranked by image-text matching.

Legend: I images, S texts (each belongs to one image; an image has one or more), Q queries (images
    or texts), C candidates (texts or images), K re-ranked candidates, E embed_dim, N image tokens,
    D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_scale.engine import collectives
from blip_scale.engine.watching.batches import beating
from blip_scale.model.med import MED
from blip_scale.model.packing import PackedText

NOT_RERANKED = -100.0
"""Score of pairs that are not re-ranked (as published)."""


@dataclass(frozen=True)
class PairFeatures:
    """Features of the held-out images and texts."""

    image_embeds: Tensor
    """Image tokens [I', N, D] of this rank's share of the images. For COCO's 5,000 images they
    take 9 GB in fp32 in total."""
    image_features: Tensor
    """Projected, L2-normalised features of all images, [I, E]."""
    text_features: Tensor
    """Projected, L2-normalised features of all texts, [S, E]."""


def recalls(scores_IS: Tensor, owners_S: Tensor) -> dict[str, float]:
    """Compute R@1, R@5 and R@10 in both directions.

    An image query is right if any of its texts is among the first k. A text query is right if its
    image is. A tie counts against the right answer, so constant scores give 0 instead of 1. A NaN
    also counts against it.

    Args:
        scores_IS: scores of all images and texts; higher is better.
        owners_S: int64, index of each text's image.
    """
    is_own_IS = owners_S == torch.arange(len(scores_IS), device=owners_S.device)[:, None]
    shares = {}
    for direction, scores_QC, is_own_QC in (
        ("image_to_text", scores_IS, is_own_IS),
        ("text_to_image", scores_IS.T, is_own_IS.T),
    ):
        best_own_Q1 = scores_QC.masked_fill(~is_own_QC, -torch.inf).amax(dim=1, keepdim=True)
        better_Q = (~(scores_QC < best_own_Q1) & ~is_own_QC).sum(dim=1)  # NaN < x is False
        for k in (1, 5, 10):
            shares[f"{direction}_r{k}"] = (better_Q < k).double().mean().item()
    return shares


def share(count: int) -> slice:
    """Return this rank's contiguous share of `count` items. Shares differ by at most one item."""
    ranks, rank = collectives.world_size(), collectives.rank()
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


@torch.no_grad()
def rerank(
    med: MED,
    features: PairFeatures,
    texts: Callable[[Sequence[int]], PackedText],
    top_k: int,
    batch_size: int,
) -> Tensor:
    """Compute re-ranked scores [2, I, S]: row 0 for image to text, row 1 for text to image.

    As published, the score is the raw matching logit plus the cosine. It is computed for each
    image's `top_k` texts by cosine, and for each text's `top_k` images. Other pairs get
    `NOT_RERANKED`. A pair that both directions need is matched once. Each rank matches the pairs
    of its share of the images.

    Args:
        med: network in evaluation mode.
        features: features of all images and texts.
        texts: function that packs the texts with these indices. The first token is [ENC].
        top_k: number of candidates re-ranked for each query.
        batch_size: number of pairs in one forward.
    """
    similarity_IS = features.image_features @ features.text_features.T
    wanted = torch.zeros(2, *similarity_IS.shape, dtype=torch.bool, device=similarity_IS.device)
    wanted[0].scatter_(1, _best(similarity_IS, top_k), True)
    wanted[1].T.scatter_(1, _best(similarity_IS.T, top_k), True)
    images_here = share(len(similarity_IS))
    pairs = wanted.any(dim=0)[images_here].nonzero()  # sorted by image: few images in a batch
    logits = torch.zeros_like(similarity_IS, dtype=torch.float32)
    for begin in beating(range(0, len(pairs), batch_size)):
        images, sentences = pairs[begin : begin + batch_size].unbind(1)
        distinct, index = images.unique(return_inverse=True)
        matched = med.match(texts(sentences.tolist()), features.image_embeds[distinct], index)
        logits[images + images_here.start, sentences] = matched[:, 1].float()
    logits = collectives.all_reduce_sum(logits)
    return torch.where(wanted, logits + similarity_IS, NOT_RERANKED)


def _best(scores_QC: Tensor, top_k: int) -> Tensor:
    """Select the columns of the `top_k` highest scores of every row, [Q, K]; equal on all ranks."""
    rows = scores_QC[share(len(scores_QC))]
    columns = rows.topk(min(top_k, scores_QC.shape[1]), dim=1).indices
    return torch.cat(collectives.all_gather_ragged(columns))


def retrieval_figures(
    scores_IS: Tensor, reranked_2IS: Tensor | None, owners_S: Tensor
) -> dict[str, float]:
    """Compute recalls `itc_...` and, for re-ranked pairs, `itm_...`.

    The result also holds the number of images, `candidates`, and the number of texts, `texts`.
    """
    owners_S = owners_S.to(scores_IS.device)
    figures = {f"itc_{name}": value for name, value in recalls(scores_IS, owners_S).items()}
    if reranked_2IS is not None:
        for direction, scores in zip(("image_to_text", "text_to_image"), reranked_2IS, strict=True):
            both = recalls(scores, owners_S)
            figures |= {f"itm_{name}": both[name] for name in both if name.startswith(direction)}
    images, texts = scores_IS.shape
    return figures | {"candidates": float(images), "texts": float(texts)}
