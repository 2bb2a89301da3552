"""The published form, the baseline of the benchmarks, computes the same losses as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from blip_scale.config.recipe import ObjectiveRecipe, OptimizerRecipe
from blip_scale.model.initialization import init_weights
from blip_scale.model.med import MED, MEDConfig, MomentumEncoder
from blip_scale.model.packing import PackedText
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig
from blip_scale.objectives.contrastive import FeaturePair
from blip_scale.objectives.feature_queue import FeatureQueue
from blip_scale.objectives.matching import HardNegatives
from blip_scale.objectives.momentum import momentum_update_
from blip_scale.tasks import pretrain
from blip_scale.tasks.momentum_contrast import MomentumContrastNetwork, MomentumInputs
from blip_scale.tasks.pretrain import PretrainNetwork
from tools.benchmarks.published_step import Negatives, PublishedStep

SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, enc=4, dec=3)
SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
NEGATIVES = Negatives([1, 2, 0], [2, 0, 1])
ALPHA = 0.3


@contextmanager
def fixed_negatives(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    drawn = HardNegatives(torch.tensor(NEGATIVES.image), torch.tensor(NEGATIVES.text))
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "draw_negatives", lambda *_: drawn)
        yield


def test_losses_are_equal_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In three optimizer steps without dropout, losses, momentum and queue agree."""
    torch.manual_seed(0)
    text = TextConfig(SPECIAL, 60, 48, 2, 4, 96, 16, dropout=0.0)
    config = MEDConfig(VisionConfig("vit_tiny_patch16_224", 32, SIZES), text, 16)
    med = MED(config)
    init_weights(med, seed=0, vision_std=0.05)
    momentum = MomentumEncoder(config)
    momentum.load_state_dict(med.state_dict(), strict=False)
    objective, settings = ObjectiveRecipe(queue_size=12), OptimizerRecipe(peak_lr=1e-3)
    queue = FeatureQueue(16, 12, seed=0)
    published = PublishedStep(
        med, objective, settings, (queue.features.image, queue.features.text), max_tokens=12
    )
    network = PretrainNetwork(med, MomentumContrastNetwork(momentum), objective)
    optimizer = torch.optim.AdamW(
        med.parameters(), lr=1e-3, betas=settings.betas, weight_decay=settings.weight_decay
    )
    images = torch.randn(3, 3, 32, 32)
    captions = PackedText.from_lists([[1, 7, 8, 9, 2], [1, 10, 2], [1, 11, 12, 13, 14, 15, 16, 2]])
    for step in range(3):
        optimizer.zero_grad()
        with fixed_negatives(monkeypatch):
            weights = torch.tensor([ALPHA, 1 - ALPHA], dtype=torch.float64)
            inputs = MomentumInputs(queue.features, weights)
            outputs = network(images, captions, inputs, torch.Generator())
        outputs["loss/total"].backward()
        optimizer.step()
        pairs = list(momentum.pairs(med))
        momentum_update_([m for _, m, _ in pairs], [p for *_, p in pairs], 0.995)
        queue.enqueue(FeaturePair(outputs["image_keys"], outputs["text_keys"]), step)
        published_losses = published.step(images, published.padded(captions), ALPHA, NEGATIVES)
        for name, loss in published_losses.items():
            assert loss == pytest.approx(outputs[f"loss/{name}"].item(), rel=1e-4), (step, name)
        close(published.image_queue, queue.features.image)
        close(published.text_queue, queue.features.text)
    weight = published.text_encoder.encoder.layer[0].crossattention.self.key.weight
    close(weight, med.text.layers[0].cross_attention.key_value.weight.chunk(2)[0])


def close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


def test_negatives_are_never_the_positive() -> None:
    scores = torch.eye(5) * 100
    drawn = PublishedStep._draw(PublishedStep.__new__(PublishedStep), scores, scores)
    for rows in (drawn.image, drawn.text):
        assert len(rows) == 5 and all(row != b for b, row in enumerate(rows))
