"""ITM: hard negatives, labels, loss, and the detection of a head that predicts one class."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blip_scale.objectives.matching import (
    CONSTANT_PREDICTION_LOSS,
    draw_negatives,
    itm_loss,
    match_accuracy,
    match_labels,
    negative_weights,
    pair_labels,
    predicts_one_class,
)

DRAWS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of_the_specification(row: list[float], positive: int) -> list[float]:
    total = sum(math.exp(value) for value in row)
    weights = [math.exp(value) / total + 1e-4 for value in row]
    weights[positive] = 0.0
    return weights


@pytest.mark.parametrize(("pool", "first_positive"), [(4, 0), (12, 0), (12, 4), (12, 8)])
def test_weights_are_those_of_the_specification(pool: int, first_positive: int) -> None:
    similar = torch.randn(4, pool, generator=generator()) * 3
    expected = []
    for row, values in enumerate(similar.tolist()):
        expected.append(weights_of_the_specification(values, first_positive + row))
    torch.testing.assert_close(negative_weights(similar, first_positive), torch.tensor(expected))


def chi_square_limit(degrees: int) -> float:
    """Upper 0.01 % of the chi-square distribution (Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize(("pool", "first_positive"), [(4, 0), (8, 4)])
def test_frequencies_follow_the_weights_and_never_hit_the_positive(
    pool: int, first_positive: int
) -> None:
    torch.manual_seed(0)
    similar = {"image": torch.randn(4, pool), "text": torch.randn(4, pool) * 2}
    random = generator(7)
    draws: dict[str, list[Tensor]] = {"image": [], "text": []}
    for _ in range(DRAWS):
        drawn = draw_negatives(similar["image"], similar["text"], random, first_positive)
        draws["image"].append(drawn.image)
        draws["text"].append(drawn.text)
    for side, chosen in draws.items():
        drawn_DB = torch.stack(chosen)
        for row in range(4):
            counts = torch.bincount(drawn_DB[:, row], minlength=pool).double()
            weights = torch.tensor(
                weights_of_the_specification(similar[side][row].tolist(), first_positive + row)
            ).double()
            assert counts[first_positive + row] == 0
            expected = weights / weights.sum() * DRAWS
            others = torch.arange(pool) != first_positive + row
            statistic = ((counts - expected)[others] ** 2 / expected[others]).sum().item()
            assert statistic < chi_square_limit(pool - 2)


def test_draws_are_those_of_multinomial_texts_first() -> None:
    text_to_image, image_to_text = torch.randn(6, 6), torch.randn(6, 6)
    random = generator(3)
    images = torch.multinomial(negative_weights(text_to_image), 1, generator=random).flatten()
    texts = torch.multinomial(negative_weights(image_to_text), 1, generator=random).flatten()
    drawn = draw_negatives(text_to_image, image_to_text, generator(3))
    assert torch.equal(drawn.image, images)
    assert torch.equal(drawn.text, texts)


def test_a_row_that_is_all_positive_still_gives_a_negative() -> None:
    peaked = torch.eye(3) * 1000
    for seed in range(50):
        drawn = draw_negatives(peaked, peaked, generator(seed))
        assert (drawn.image != torch.arange(3)).all()
        assert (drawn.text != torch.arange(3)).all()


def test_non_finite_similarities_do_not_raise() -> None:
    drawn = draw_negatives(torch.full((3, 3), torch.nan), torch.zeros(3, 3), generator())
    assert ((drawn.image >= 0) & (drawn.image < 3)).all()


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw_negatives(torch.zeros(3, 3), torch.zeros(3, 3), generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_pool_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no negative.*2 or more"):
        draw_negatives(torch.zeros(1, 1), torch.zeros(1, 1), generator())


def test_loss_of_a_constant_prediction() -> None:
    labels = match_labels(5, "cpu")
    assert labels.tolist() == [1] * 5 + [0] * 10
    logits = torch.tensor([2 / 3, 1 / 3]).log().expand(15, 2)
    assert itm_loss(logits, labels).item() == pytest.approx(0.6365, abs=1e-4)
    assert pytest.approx(itm_loss(logits, labels).item(), abs=1e-6) == CONSTANT_PREDICTION_LOSS


def test_loss_is_the_mean_in_fp32() -> None:
    logits = torch.randn(6, 2).bfloat16()
    labels = match_labels(2, "cpu")
    expected = 0.0
    for (no, yes), label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        expected += math.log(math.exp(no) + math.exp(yes)) - (yes if label else no)
    loss = itm_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected / 6, abs=1e-5)


def test_accuracy_by_class() -> None:
    labels = match_labels(2, "cpu")
    yes, no = [0.0, 1.0], [1.0, 0.0]
    on_match, on_mismatch = match_accuracy(torch.tensor([yes, no, no, no, no, yes]), labels)
    assert (on_match.item(), on_mismatch.item()) == (0.5, 0.75)
    on_match, on_mismatch = match_accuracy(torch.tensor([no] * 6), labels)
    assert (on_match.item(), on_mismatch.item()) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("loss", "match", "mismatch", "expected"),
    [
        (0.6365, 0.4, 0.6, True),  # stuck at the constant prediction
        (0.654, 0.1, 0.9, True),
        (0.69, 0.0, 1.0, True),  # one answer, whatever the loss
        (0.5, 1.0, 0.0, True),
        (0.69, 0.5, 0.5, False),
        (0.4, 0.7, 0.9, False),
        (0.01, 1.0, 1.0, False),
        (float("nan"), 0.5, 0.5, False),
    ],
)
def test_one_class(loss: float, match: float, mismatch: float, expected: bool) -> None:
    assert predicts_one_class(loss, match, mismatch) is expected


class TestImagesThatComeAgain:
    """Retrieval fine-tuning: pairs of one image are no negatives of each other."""

    def test_weights_are_the_published_ones(self) -> None:
        """As published: softmax over all pairs, with those of the same image set to 0.

        multinomial draws in proportion to the weights, so a factor per row makes no difference.
        """
        similarities = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 5
        same = torch.zeros(4, 6, dtype=torch.bool)
        same[torch.arange(4), torch.arange(4)] = True
        same[0, 4] = same[2, 5] = True
        published = similarities.softmax(dim=1).masked_fill(same, 0.0)
        expected = published / published.sum(dim=1, keepdim=True)
        torch.testing.assert_close(negative_weights(similarities, same_image_BP=same), expected)

    def test_nothing_of_the_same_image_is_drawn(self) -> None:
        """The same image is by far the most similar, as after pretraining."""
        ids = torch.tensor([7, 7, 3, 3, 5])
        same = ids[:, None] == ids
        similarities = same.float() * 500
        generator = torch.Generator().manual_seed(1)
        for _ in range(50):
            negatives = draw_negatives(similarities, similarities, generator, same_image_BP=same)
            assert (ids[negatives.image] != ids).all() and (ids[negatives.text] != ids).all()

    def test_a_pool_of_one_image_gives_matches(self) -> None:
        """A row without a negative draws a pair of the same image, which is labelled a match."""
        same = torch.tensor([[True, True, False], [True, True, False], [True, True, True]])
        scores = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
        negatives = draw_negatives(scores, scores, torch.Generator(), same_image_BP=same)
        labels = pair_labels(negatives, same)
        assert labels.tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 1]
        assert match_accuracy(torch.tensor([[0.0, 1.0]] * 3), torch.ones(3).long()) == (1.0, 0.0)
