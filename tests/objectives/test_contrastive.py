"""ITC against the specification written out row by row, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.objectives.contrastive import (
    FeaturePair,
    Similarities,
    alpha_at,
    itc_loss,
    retrieval_accuracy,
    similarities,
    soft_targets,
)

B, E, Q = 5, 8, 11


def unit(*shape: int, seed: int, dim: int = -1) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=dim)


def pairs() -> tuple[FeaturePair, FeaturePair, FeaturePair]:
    queries = FeaturePair(unit(B, E, seed=0).requires_grad_(), unit(B, E, seed=1).requires_grad_())
    keys = FeaturePair(unit(B, E, seed=2), unit(B, E, seed=3))
    queue = FeaturePair(unit(E, Q, seed=4, dim=0), unit(E, Q, seed=5, dim=0))
    return queries, keys, queue


def loss_of_the_specification(
    queries: FeaturePair, keys: FeaturePair, queue: FeaturePair, temperature: Tensor, alpha: float
) -> Tensor:
    """ITC with the queue appended to the batch, computed one row and one column at a time."""
    total = torch.zeros(())
    for online, momentum, others, other_queue in (
        (queries.image, keys.image, keys.text, queue.text),
        (queries.text, keys.text, keys.image, queue.image),
    ):
        columns = torch.cat([others.T, other_queue], dim=1)
        for row in range(B):
            logits = torch.stack([online[row] @ columns[:, j] for j in range(B + Q)]) / temperature
            momentum_logits = (
                torch.stack([momentum[row] @ columns[:, j] for j in range(B + Q)])
                / temperature.detach()
            )
            hard = torch.zeros(B + Q)
            hard[row] = 1.0
            soft = momentum_logits.exp() / momentum_logits.exp().sum()
            target = alpha * soft + (1 - alpha) * hard
            log_probability = logits - logits.exp().sum().log()
            total = total - (target * log_probability).sum() / B / 2
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_loss_and_gradients_are_those_of_the_specification(alpha: float) -> None:
    queries, keys, queue = pairs()
    temperature = torch.tensor(0.2, requires_grad=True)
    inputs = [queries.image, queries.text, temperature]

    expected = loss_of_the_specification(queries, keys, queue, temperature, alpha)
    expected_gradients = torch.autograd.grad(expected, inputs)
    with torch.no_grad():
        momentum = similarities(keys, keys, queue, temperature)
    loss = itc_loss(similarities(queries, keys, queue, temperature), momentum, alpha)

    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs), expected_gradients, atol=1e-5, rtol=1e-5
    )


def test_keys_are_constants() -> None:
    queries, keys, queue = pairs()
    keys.image.requires_grad_()
    similar = similarities(queries, keys, queue, torch.tensor(0.1))
    (similar.image_to_text.sum() + similar.text_to_image.sum()).backward()
    assert keys.image.grad is None
    assert queries.image.grad is not None


def test_local_batch_comes_first_then_the_queue() -> None:
    queries, keys, queue = pairs()
    similar = similarities(queries, keys, queue, torch.tensor(0.5))
    assert similar.text_to_image.shape == (B, B + Q)
    expected = queries.text[1] @ keys.image[2] / 0.5
    torch.testing.assert_close(similar.text_to_image[1, 2], expected)
    expected = queries.text[1] @ queue.image[:, 3] / 0.5
    torch.testing.assert_close(similar.text_to_image[1, B + 3], expected)


def test_uniform_similarities_cost_the_log_of_the_number_of_keys() -> None:
    same = F.normalize(torch.ones(3, E), dim=1)
    batch = FeaturePair(same, same)
    queue = FeaturePair(same[:1].T.expand(E, 57_597), same[:1].T.expand(E, 57_597))
    similar = similarities(batch, batch, queue, torch.tensor(0.07))
    for alpha in (0.0, 0.4):
        assert itc_loss(similar, similar, alpha).item() == pytest.approx(math.log(57_600), abs=1e-4)


def test_similarities_and_loss_are_fp32_from_bf16_features() -> None:
    queries, keys, queue = pairs()
    rounded = FeaturePair(queries.image.bfloat16(), queries.text.bfloat16())
    keys = FeaturePair(keys.image.bfloat16(), keys.text.bfloat16())
    temperature = torch.tensor(0.001, dtype=torch.bfloat16)
    similar = similarities(rounded, keys, queue, temperature)
    loss = itc_loss(similar, similar, 0.4)
    assert similar.image_to_text.dtype == loss.dtype == torch.float32
    exact = rounded.image[0].double() @ keys.text[0].double() / temperature.double()
    assert similar.image_to_text[0, 0].item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.isfinite(loss)


def test_soft_targets_are_distributions() -> None:
    momentum = torch.randn(B, B + Q)
    before = momentum.clone()
    targets = soft_targets(momentum, 0.4)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(B))
    assert (targets.diagonal() >= 0.6).all()
    assert torch.equal(momentum, before)


def test_alpha_rises_over_two_epochs_and_stays() -> None:
    assert [alpha_at(step, 100, 0.4, 2.0) for step in (0, 50, 100, 200, 5_000)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.4, 0.4]
    )
    assert alpha_at(0, 100, 0.4, 0.0) == 0.4


def test_retrieval_accuracy_looks_at_the_batch_alone() -> None:
    similar = torch.full((4, 10), -1.0)
    similar[:, 4:] = 9.0  # the queue is no candidate
    for row, column in enumerate((0, 1, 0, 3)):
        similar[row, column] = 1.0
    perfect = torch.eye(4, 10)
    online = type("Online", (), {"image_to_text": similar, "text_to_image": perfect})
    image_to_text, text_to_image = retrieval_accuracy(online)  # type: ignore[arg-type]
    assert (image_to_text.item(), text_to_image.item()) == (0.75, 1.0)


def test_texts_of_one_image_share_the_target() -> None:
    """The hard target is spread evenly over all keys of the image, in the batch and the queue.

    The expected loss is written out pair by pair, as published.
    """
    batch, columns, alpha = 3, 5, 0.3
    generator = torch.Generator().manual_seed(4)
    ids, queue_ids = torch.tensor([1, 2, 1]), torch.tensor([2, -100, 1, 9, 1])
    online = Similarities(*torch.randn(2, batch, batch + columns, generator=generator))
    momentum = Similarities(*torch.randn(2, batch, batch + columns, generator=generator))
    keys = torch.cat([ids, queue_ids])
    total = 0.0
    for direction in ("image_to_text", "text_to_image"):
        scores, soft = getattr(online, direction), getattr(momentum, direction).softmax(dim=1)
        for row in range(batch):
            right = [float(key == ids[row]) for key in keys]
            logs = scores[row].log_softmax(dim=0).tolist()
            for k in range(batch + columns):
                target = alpha * soft[row, k].item() + (1 - alpha) * right[k] / sum(right)
                total -= target * logs[k] / batch / 2
    loss = itc_loss(online, momentum, alpha, ids[:, None] == keys)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    alone = itc_loss(online, momentum, alpha, torch.eye(batch, batch + columns).bool())
    assert torch.equal(alone, itc_loss(online, momentum, alpha))
