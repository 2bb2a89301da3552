"""Retrieval metrics and re-ranking against plain computations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from fake_ranks import FakeRanks
from torch import Tensor

from blip_scale.evaluation import retrieval
from blip_scale.evaluation.retrieval import NOT_RERANKED, PairFeatures, share
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig

IMAGES, TEXTS, TOP_K = 7, 10, 3
PAD, CLS, SEP, ENC, DEC = range(5)
_DIRECTIONS = ("image_to_text", "text_to_image")
RECALLS = [f"{direction}_r{k}" for direction in _DIRECTIONS for k in (1, 5, 10)]


def recalls(scores: Tensor) -> dict[str, float]:
    """Recalls if text i belongs to image i."""
    return retrieval.recalls(scores, torch.arange(len(scores)))


@pytest.mark.parametrize("ties", [False, True])
def test_several_texts_an_image_against_a_count(ties: bool) -> None:
    """Any of an image's texts counts as right. Ties with texts of other images count against it."""
    generator = torch.Generator().manual_seed(3)
    owners = torch.randint(0, 12, (40,), generator=generator)
    owners[:12] = torch.arange(12)
    scores = torch.randn(12, 40, generator=generator)
    if ties:
        scores = scores.round()
    shares = retrieval.recalls(scores, owners)

    def texts_of_others_before(image: int, text: int) -> int:
        """Number of other images' texts that score at least as high as `text`."""
        return int(((scores[image] >= scores[image, text]) & (owners != image)).sum())

    for k in (1, 5, 10):
        images = texts = 0
        for image in range(12):
            places = [texts_of_others_before(image, text) for text in (owners == image).nonzero()]
            images += min(places) < k
        for text, owner in enumerate(owners):
            texts += int((scores[:, text] >= scores[owner, text]).sum()) - 1 < k
        assert shares[f"image_to_text_r{k}"] == pytest.approx(images / 12)
        assert shares[f"text_to_image_r{k}"] == pytest.approx(texts / 40)
    assert len(set(shares.values())) > 3


def test_the_right_answer_first_is_a_recall_of_one() -> None:
    assert recalls(torch.eye(20)) == dict.fromkeys(RECALLS, 1.0)


def test_recalls_of_known_places() -> None:
    """Image i has its text in place i. The places of the texts' images are counted by hand."""
    count = 12
    scores = torch.zeros(count, count)
    for image in range(count):
        others = [text for text in range(count) if text != image]
        order = [*others[:image], image, *others[image:]]
        for place, text in enumerate(order):
            scores[image, text] = count - place
    shares = recalls(scores)
    assert [shares[f"image_to_text_r{k}"] for k in (1, 5, 10)] == pytest.approx(
        [1 / 12, 5 / 12, 10 / 12]
    )
    places = [int((scores[:, text] >= scores[text, text]).sum()) - 1 for text in range(count)]
    for k in (1, 5, 10):
        expected = sum(place < k for place in places) / count
        assert shares[f"text_to_image_r{k}"] == pytest.approx(expected)


def test_a_permutation_counts_its_fixed_points() -> None:
    """Scores put text p(i) first for image i, which is right if p(i) = i, in both directions."""
    generator = torch.Generator().manual_seed(1)
    permutation = torch.randperm(30, generator=generator)
    permutation[4], permutation[permutation.tolist().index(4)] = 4, permutation[4].clone()
    scores = torch.zeros(30, 30)
    scores[torch.arange(30), permutation] = 1.0
    fixed = (permutation == torch.arange(30)).double().mean().item()
    assert fixed > 0
    shares = recalls(scores)
    assert shares["image_to_text_r1"] == pytest.approx(fixed)
    assert shares["text_to_image_r1"] == pytest.approx(fixed)


@pytest.mark.parametrize("value", [0.0, 1.0, NOT_RERANKED])
def test_ties_count_against(value: float) -> None:
    """A collapsed network, which gives all pairs one score, has recalls of 0."""
    assert set(recalls(torch.full((20, 20), value)).values()) == {0.0}
    half = torch.eye(20)
    half[0, 1] = 1.0  # image 0 ties with text 1, and text 1 with image 0
    shares = recalls(half)
    assert shares["image_to_text_r1"] == shares["text_to_image_r1"] == pytest.approx(19 / 20)
    assert shares["image_to_text_r5"] == 1.0


def test_scores_that_are_nan_are_wrong() -> None:
    assert set(recalls(torch.full((20, 20), torch.nan)).values()) == {0.0}
    one_nan = torch.eye(20)
    one_nan[0, 1] = torch.nan  # text 1 may be better for image 0, and image 0 for text 1
    figures = recalls(one_nan)
    assert figures["image_to_text_r1"] == figures["text_to_image_r1"] == pytest.approx(19 / 20)
    one_nan = torch.eye(20)
    one_nan[3, 3] = torch.nan
    figures = recalls(one_nan)
    assert figures["image_to_text_r10"] == figures["text_to_image_r10"] == pytest.approx(19 / 20)


def test_fewer_candidates_than_places() -> None:
    assert recalls(torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == {
        "image_to_text_r1": 0.5, "image_to_text_r5": 1.0, "image_to_text_r10": 1.0,
        "text_to_image_r1": 0.0, "text_to_image_r5": 1.0, "text_to_image_r10": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("count", "ranks"), [(10, 3), (2, 4), (0, 2), (16, 4), (5, 1)])
def test_shares_cover_all_without_overlap(
    count: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = FakeRanks(ranks, monkeypatch).run(lambda rank: list(range(count))[share(count)])
    assert [item for part in parts for item in part] == list(range(count))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.fixture(scope="module")
def med() -> MED:
    """Two layers a tower, weights far from a network that answers everything alike."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
    special = SpecialTokens(pad=PAD, cls=CLS, sep=SEP, enc=ENC, dec=DEC)
    text = TextConfig(
        special, vocab_size=40, width=24, layers=2, heads=2, mlp_width=48, dropout=0.0
    )
    med = MED(MEDConfig(VisionConfig("vit_tiny_patch16_224", 16, sizes), text, 12))
    init_weights(med, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return med.eval()


def sentence(index: int) -> list[int]:
    """A caption with its own length."""
    return [CLS, *range(5 + index, 9 + index + index % 3), SEP]


def matching_texts(indices: Sequence[int]) -> PackedText:
    return PackedText.from_lists([sentence(i) for i in indices]).with_first_token(ENC)


@pytest.fixture(scope="module")
def features(med: MED) -> PairFeatures:
    images = torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        embeds = med.encode_image(images)
        sentences = PackedText.from_lists([sentence(i) for i in range(TEXTS)])
        return PairFeatures(
            embeds, med.project_image(embeds), med.project_text(med.encode_text(sentences))
        )


@torch.no_grad()
def brute_force(med: MED, features: PairFeatures, top_k: int) -> Tensor:
    """Re-ranked scores by one forward for each pair."""
    cosine = features.image_features @ features.text_features.T
    scores = torch.full((2, IMAGES, TEXTS), NOT_RERANKED)
    for image in range(IMAGES):
        for text in range(TEXTS):
            logits = med.match(
                matching_texts([text]), features.image_embeds[image : image + 1], torch.tensor([0])
            )
            score = logits[0, 1] + cosine[image, text]
            if (cosine[image] > cosine[image, text]).sum() < top_k:
                scores[0, image, text] = score
            if (cosine[:, text] > cosine[image, text]).sum() < top_k:
                scores[1, image, text] = score
    return scores


def of_rank(features: PairFeatures) -> PairFeatures:
    """Features of a rank, with the image tokens of its share alone."""
    return replace(features, image_embeds=features.image_embeds[share(IMAGES)])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("top_k", "batch_size"), [(TOP_K, 4), (100, 64), (1, 1)])
def test_reranking_equals_brute_force(
    med: MED,
    features: PairFeatures,
    ranks: int,
    top_k: int,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks have the scores of both directions, for any batch size and number of ranks."""
    expected = brute_force(med, features, top_k)
    scores_of_ranks = FakeRanks(ranks, monkeypatch).run(
        lambda rank: retrieval.rerank(med, of_rank(features), matching_texts, top_k, batch_size)
    )
    for scores in scores_of_ranks:
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    reranked = scores_of_ranks[0] != NOT_RERANKED
    assert (reranked[0].sum(dim=1) == min(top_k, TEXTS)).all()
    assert (reranked[1].sum(dim=0) == min(top_k, IMAGES)).all()
    seen = expected[reranked]
    assert len(seen) == 1 or seen.std() > 0.01  # the network does tell pairs apart


def test_no_candidates_leave_nothing_reranked(med: MED, features: PairFeatures) -> None:
    scores = retrieval.rerank(med, features, matching_texts, 0, 4)
    assert (scores == NOT_RERANKED).all()


def test_figures_take_each_direction_from_its_own_scores() -> None:
    plain = retrieval.retrieval_figures(torch.eye(20), None, torch.arange(20))
    assert plain == {f"itc_{name}": 1.0 for name in RECALLS} | {
        "candidates": 20.0, "texts": 20.0
    }  # fmt: skip
    wrong = 1.0 - torch.eye(20)
    figures = retrieval.retrieval_figures(
        wrong, torch.stack([torch.eye(20), wrong]), torch.arange(20)
    )
    assert list(figures) == [
        *[f"itc_{name}" for name in RECALLS], *[f"itm_{name}" for name in RECALLS],
        "candidates", "texts",
    ]  # fmt: skip
    assert figures["itc_image_to_text_r1"] == 0.0
    assert figures["itm_image_to_text_r10"] == 1.0
    assert figures["itm_text_to_image_r10"] == 0.0
