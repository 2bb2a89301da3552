"""No objective makes the host wait for the device: none of them reads a value of a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blip_scale.objectives.contrastive import (
    FeaturePair,
    itc_loss,
    retrieval_accuracy,
    similarities,
)
from blip_scale.objectives.feature_queue import FeatureQueue
from blip_scale.objectives.language import lm_loss
from blip_scale.objectives.matching import draw_negatives, itm_loss, match_accuracy, match_labels
from blip_scale.objectives.momentum import momentum_update_

B, E, Q, V = 4, 8, 12, 20

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "multinomial", "bincount"}
"""Operators that copy a value from a GPU to the host, or wait for one."""


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_value() -> None:
    queue = FeatureQueue(E, Q, seed=0)
    generator = torch.Generator()
    with NoWaiting():
        keys = FeaturePair(torch.randn(B, E), torch.randn(B, E))
        queries = FeaturePair(torch.randn(B, E, requires_grad=True), torch.randn(B, E))
        temperature = torch.tensor(0.07)
        online = similarities(queries, keys, queue.features, temperature)
        loss = itc_loss(online, similarities(keys, keys, queue.features, temperature), 0.4)
        drawn = draw_negatives(online.text_to_image[:, :B], online.image_to_text[:, :B], generator)
        labels = match_labels(B, "cpu")
        logits = torch.randn(3 * B, 2, requires_grad=True)
        accuracies = [*match_accuracy(logits, labels), *retrieval_accuracy(online)]
        loss = loss + itm_loss(logits, labels)
        loss = loss + lm_loss(torch.randn(9, V, requires_grad=True), torch.randint(0, V, (9,)))
        loss.backward()
        for step in range(2):  # the second one wraps
            queue.enqueue(FeaturePair(torch.randn(8, E), torch.randn(8, E)), step)
        momentum_update_([torch.randn(3)], [torch.randn(3)], 0.995)
        with pytest.raises(AssertionError, match="waits"):  # the mode does catch a read
            loss.item()
    assert drawn.image.shape == drawn.text.shape == (B,)
    assert all(0 <= accuracy.item() <= 1 for accuracy in accuracies)
