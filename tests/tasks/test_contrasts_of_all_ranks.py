"""CLIP's and SigLIP's losses against formulas written out pair by pair, on one and two ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fake_ranks import FakeRanks
from torch import Tensor, nn

from blip_scale.model.attention import Segments
from blip_scale.model.packing import PackedText
from blip_scale.objectives.contrastive import FeaturePair
from blip_scale.tasks.contrast import Contrasted, EncodedPairs
from blip_scale.tasks.in_batch_contrast import InBatchNetwork
from blip_scale.tasks.sigmoid_contrast import SigmoidNetwork

PAIRS, EMBED, BIAS = 6, 4, -2.0
IDS = torch.tensor([7, 3, 7, 9, 3, 3])


def clip_written_out(scores: Tensor, matches: Tensor) -> Tensor:
    """-log of the softmax at the matches, mean over rows and both directions."""
    total = scores.new_zeros(())
    for direction in (scores, scores.T):
        for row, is_match in zip(direction, matches, strict=True):
            logs = row - row.exp().sum().log()
            total = total - logs[is_match].mean() / len(scores) / 2
    return total


def siglip_written_out(scores: Tensor, matches: Tensor) -> Tensor:
    """log(1 + exp(-z (score + bias))), z = 1 for a match and -1 for a mismatch, divided by rows."""
    total = scores.new_zeros(())
    for i in range(len(scores)):
        for j in range(len(scores)):
            z = 1.0 if matches[i, j] else -1.0
            total = total + torch.log1p(torch.exp(-z * (scores[i, j] + BIAS)))
    return total / len(scores)


KINDS = {
    "in_batch": (InBatchNetwork, clip_written_out),
    "sigmoid": (lambda: SigmoidNetwork(BIAS), siglip_written_out),
}


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(2, PAIRS, EMBED, generator=generator)
    return images.requires_grad_(), texts.requires_grad_(), torch.tensor(0.3, requires_grad=True)


def contrasted(
    network: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], rows: slice, ids: Tensor | None
) -> Contrasted:
    images, texts, temperature = inputs
    features = FeaturePair(F.normalize(images[rows], dim=1), F.normalize(texts[rows], dim=1))
    text = PackedText(torch.zeros(0, dtype=torch.int64), Segments(torch.zeros(1), 0))
    own_ids = None if ids is None else ids[rows]
    output = network(EncodedPairs(torch.empty(0), text, features, temperature, own_ids), None)
    assert isinstance(output, Contrasted)
    return output


@pytest.mark.parametrize("ids", [None, IDS], ids=["no-ids", "repeated-images"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_global_batch(
    kind: str, ranks: int, ids: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, written_out = KINDS[kind]
    network, inputs = build(), leaves()
    matches = torch.eye(PAIRS).bool() if ids is None else ids[:, None] == ids
    scores = F.normalize(inputs[0], dim=1) @ F.normalize(inputs[1], dim=1).T / inputs[2]
    expected = written_out(scores, matches)
    wanted = torch.autograd.grad(expected, inputs, retain_graph=True)

    size = PAIRS // ranks
    outputs = FakeRanks(ranks, monkeypatch).run(
        lambda rank: contrasted(network, inputs, slice(rank * size, (rank + 1) * size), ids)
    )
    loss = torch.stack([output.loss for output in outputs]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    for rank, output in enumerate(outputs):
        rows = slice(rank * size, (rank + 1) * size)
        torch.testing.assert_close(output.similarities.image_to_text, scores[rows, rows])
        torch.testing.assert_close(output.similarities.text_to_image, scores[rows, rows].T)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("in_batch", math.log(PAIRS)),
        ("sigmoid", math.log1p(math.exp(-BIAS)) + (PAIRS - 1) * math.log1p(math.exp(BIAS))),
    ],
)
def test_equal_similarities_cost_the_closed_form(kind: str, expected: float) -> None:
    network = KINDS[kind][0]()
    images, texts, temperature = leaves()
    orthogonal = (images.detach() * torch.tensor([1.0, 1, 0, 0]), texts.detach().flip(1))
    orthogonal = (orthogonal[0], orthogonal[1] * torch.tensor([0.0, 0, 1, 1]))
    loss = contrasted(network, (*orthogonal, temperature), slice(None), None).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)
