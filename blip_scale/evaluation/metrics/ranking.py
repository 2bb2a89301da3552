"""Metrics of ranked candidates with the rules of the VisDial challenge (Das et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks_of(scores_QC: Tensor, true_Q: Tensor) -> Tensor:
    """Rank each question's true candidate, [Q] int64 counted from 1.

    A tie counts against the true candidate, so with constant scores it is the last. A NaN also
    counts against it.

    Args:
        scores_QC: scores of the candidates; higher is better.
        true_Q: int64, index of the true candidate.
    """
    own_Q1 = scores_QC.gather(1, true_Q[:, None])
    return (~(scores_QC < own_Q1)).sum(1)  # comparisons with NaN are False


def ranking_figures(ranks_Q: Tensor) -> dict[str, float]:
    """Compute mean reciprocal rank, R@1, R@5, R@10 and mean rank."""
    ranks = ranks_Q.double()
    recalls = {f"r{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return {"mrr": (1 / ranks).mean().item(), **recalls, "mean_rank": ranks.mean().item()}


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    """Compute the normalised discounted cumulative gain of one question's candidates.

    As in the challenge, the list is cut after k candidates, where k is the number of candidates
    with a relevance above 0.

    Raises:
        ValueError: no candidate has a relevance above 0.
    """
    gains = torch.tensor(relevance, dtype=torch.float64)
    counted = int((gains > 0).sum())
    if not counted:
        raise ValueError("NDCG: no candidate has a relevance above 0")
    scored = torch.tensor(scores, dtype=torch.float64).nan_to_num(nan=-torch.inf)
    order = scored.argsort(descending=True, stable=True)
    discounts = torch.arange(2, counted + 2, dtype=torch.float64).log2()
    ideal = gains.sort(descending=True).values[:counted]
    return float((gains[order[:counted]] / discounts).sum() / (ideal / discounts).sum())
