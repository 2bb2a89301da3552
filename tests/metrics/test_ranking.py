"""Figures of rankings against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blip_scale.evaluation.metrics.ranking import ndcg, ranking_figures, ranks_of


def test_ranks() -> None:
    """Ties count against the true candidate."""
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.5, 0.5, 0.5]])
    assert ranks_of(scores, torch.tensor([1, 0, 2])).tolist() == [1, 3, 3]


def test_figures() -> None:
    figures = ranking_figures(torch.tensor([1, 2, 6, 20]))
    assert figures == {
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 20) / 4),
        "r1": 0.25, "r5": 0.5, "r10": 0.75, "mean_rank": 7.25,
    }  # fmt: skip


def test_ndcg() -> None:
    """Two candidates are relevant, so two places count."""
    relevance = [0.0, 1.0, 0.5, 0.0]
    assert ndcg([0.1, 0.9, 0.5, 0.2], relevance) == pytest.approx(1)
    ideal = 1 + 0.5 / math.log2(3)
    assert ndcg([0.9, 0.5, 0.1, 0.2], relevance) == pytest.approx(1 / math.log2(3) / ideal)
    assert ndcg([0.9, 0.1, 0.2, 0.5], relevance) == 0
    with pytest.raises(ValueError, match="no candidate"):
        ndcg([0.1, 0.2], [0.0, 0.0])


def test_scores_that_are_nan_come_last() -> None:
    scores = torch.tensor([[torch.nan, 1.0, 0.0], [2.0, torch.nan, 0.0]])
    assert ranks_of(scores, torch.tensor([0, 0])).tolist() == [3, 2]
    assert ndcg([float("nan"), 1.0], [1.0, 0.0]) == ndcg([0.0, 1.0], [1.0, 0.0])
