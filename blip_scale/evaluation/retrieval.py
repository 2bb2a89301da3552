"""Zero-shot image-text retrieval: contrastive similarity, then image-text matching on the best
candidates.

Legend: I images, S texts (each belongs to one image, an image has one or more), Q queries (images
    or texts) and C candidates (the other kind), K of them re-ranked, E embed_dim, N image tokens, D
    width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_scale.engine import collectives
from blip_scale.model.med import MED
from blip_scale.model.packing import PackedText

NOT_RERANKED = -100.0
"""Score of the pairs that image-text matching never saw (as published)."""


@dataclass(frozen=True)
class PairFeatures:
    """Features of the held-out images and texts."""

    image_embeds: Tensor
    """[I', N, D] image tokens of this rank's share of the images alone: of COCO's 5,000 they take 9
    GB in fp32."""
    image_features: Tensor
    """[I, E] projected and normalised."""
    text_features: Tensor
    """[S, E] projected and normalised."""


def recalls(scores_IS: Tensor, owners_S: Tensor) -> dict[str, float]:
    """R@1, R@5, R@10 in both directions. An image is right when any of its texts is among the first
    k, a text when its image is.

    A tie counts against the right answer, so that constant scores give 0 and not 1. So does a
    score that is NaN, of the right answer or of any other.

    Args:
        scores_IS: higher is better.
        owners_S: int64, the image that each text belongs to.
    """
    is_own_IS = owners_S == torch.arange(len(scores_IS), device=owners_S.device)[:, None]
    found = {}
    for direction, scores_QC, is_own_QC in (
        ("image_to_text", scores_IS, is_own_IS),
        ("text_to_image", scores_IS.T, is_own_IS.T),
    ):
        best_own_Q1 = scores_QC.masked_fill(~is_own_QC, -torch.inf).amax(dim=1, keepdim=True)
        better_Q = (~(scores_QC < best_own_Q1) & ~is_own_QC).sum(dim=1)  # NaN is never lower
        for k in (1, 5, 10):
            found[f"{direction}_r{k}"] = (better_Q < k).double().mean().item()
    return found


def share(count: int) -> slice:
    """This rank's contiguous part of `count` items; the parts of all ranks differ by at most one
    item."""
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
    """Scores [2, I, S]: row 0 re-ranked image to text, row 1 text to image (transposed back to [I,
    S]).

    For each image its `top_k` texts by cosine, and for each text its `top_k` images, get the raw
    match logit plus the cosine; every other pair gets -100 (as published). A pair that both
    directions want is matched once. Each rank takes the pairs of its own images.

    Args:
        texts: packed texts of some indices, first token [ENC].
    """
    similarity_IS = features.image_features @ features.text_features.T
    wanted = torch.zeros(2, *similarity_IS.shape, dtype=torch.bool, device=similarity_IS.device)
    wanted[0].scatter_(1, _best(similarity_IS, top_k), True)
    wanted[1].T.scatter_(1, _best(similarity_IS.T, top_k), True)
    own = share(len(similarity_IS))
    mine = wanted.any(dim=0)[own].nonzero()  # in the order of the images: a batch has few of them
    logits = torch.zeros_like(similarity_IS, dtype=torch.float32)
    for begin in range(0, len(mine), batch_size):
        images, sentences = mine[begin : begin + batch_size].unbind(1)
        own_images, index = images.unique(return_inverse=True)
        matched = med.match(texts(sentences.tolist()), features.image_embeds[own_images], index)
        logits[images + own.start, sentences] = matched[:, 1].float()
    logits = collectives.all_reduce_sum(logits)
    return torch.where(wanted, logits + similarity_IS, NOT_RERANKED)


def _best(scores_QC: Tensor, top_k: int) -> Tensor:
    """Columns of the `top_k` highest scores of every row, [Q, K], the same on all ranks."""
    mine = scores_QC[share(len(scores_QC))].topk(min(top_k, scores_QC.shape[1]), dim=1).indices
    return torch.cat(collectives.all_gather_ragged(mine))


def retrieval_figures(
    scores_IS: Tensor, reranked_2IS: Tensor | None, owners_S: Tensor
) -> dict[str, float]:
    """`itc_...` and, where the pairs were re-ranked, `itm_...` recalls, and the numbers of
    candidates, images (`candidates`) and `texts`."""
    owners_S = owners_S.to(scores_IS.device)
    figures = {f"itc_{name}": value for name, value in recalls(scores_IS, owners_S).items()}
    if reranked_2IS is not None:
        for direction, scores in zip(("image_to_text", "text_to_image"), reranked_2IS, strict=True):
            both = recalls(scores, owners_S)
            figures |= {f"itm_{name}": both[name] for name in both if name.startswith(direction)}
    images, texts = scores_IS.shape
    return figures | {"candidates": float(images), "texts": float(texts)}
