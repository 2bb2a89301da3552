"""The queue: order, wrap-around, type, age, state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip_scale.objectives.contrastive import FeaturePair
from blip_scale.objectives.feature_queue import FeatureQueue

E = 3


def features(first: int, count: int) -> FeaturePair:
    """Features filled with consecutive numbers from `first`. Texts are the images' negatives."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, E)
    return FeaturePair(numbers, -numbers)


def columns(buffer: Tensor) -> list[float]:
    assert (buffer == buffer[0]).all()
    return buffer[0].tolist()


def test_starts_as_random_unit_columns_the_same_for_a_seed() -> None:
    first, same, other = FeatureQueue(64, 50, 1), FeatureQueue(64, 50, 1), FeatureQueue(64, 50, 2)
    assert torch.equal(first.features.image, same.features.image)
    assert torch.equal(first.features.text, same.features.text)
    assert not torch.equal(first.features.image, other.features.image)
    assert not torch.equal(first.features.image, first.features.text)
    torch.testing.assert_close(first.features.image.norm(dim=0), torch.ones(50))
    assert abs((first.features.image[:, 0] @ first.features.image[:, 1]).item()) < 0.6


def test_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    FeatureQueue(E, 10, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_ring_holds_the_newest_in_order_for_any_batch_size() -> None:
    size = 7
    queue = FeatureQueue(E, size, seed=0)
    ring: list[float] = [float("nan")] * size
    number = pointer = 0
    for step, count in enumerate((3, 3, 3, 7, 1, 5, 6, 2)):  # none but 7 and 1 divides 7
        queue.enqueue(features(number, count), step)
        for offset in range(count):
            ring[(pointer + offset) % size] = float(number + offset)
        number, pointer = number + count, (pointer + count) % size
        assert queue.pointer == pointer
        assert queue.enqueued == number
        if number >= size:
            assert columns(queue.features.image) == ring
            assert columns(queue.features.text) == [-value for value in ring]
            assert sorted(ring) == list(range(number - size, number))


def test_more_than_the_queue_holds_is_refused() -> None:
    queue = FeatureQueue(E, 7, seed=0)
    with pytest.raises(ValueError, match=r"global batch of 8 .* queue of 7.*objective\.queue_size"):
        queue.enqueue(features(0, 8), 0)
    assert queue.pointer == queue.enqueued == 0


def test_other_shapes_are_refused() -> None:
    queue = FeatureQueue(E, 7, seed=0)
    images = features(0, 2).image
    for texts in (images[:1], images[:, :2]):
        with pytest.raises(ValueError, match="must both be"):
            queue.enqueue(FeaturePair(images, texts), 0)


def test_stays_fp32_when_bf16_comes_in() -> None:
    queue = FeatureQueue(E, 4, seed=0)
    third = torch.full((2, E), 1 / 3, dtype=torch.bfloat16)
    queue.enqueue(FeaturePair(third, third), 0)
    assert queue.features.image.dtype == queue.features.text.dtype == torch.float32
    assert torch.equal(queue.features.image[:, :2], third.float().T)


def test_no_gradient_enters() -> None:
    queue = FeatureQueue(E, 4, seed=0)
    online = torch.randn(2, E, requires_grad=True)
    queue.enqueue(FeaturePair(online, online), 0)
    assert not queue.features.image.requires_grad


def test_age_counts_what_was_written() -> None:
    queue = FeatureQueue(E, 6, seed=0)
    assert queue.age(0) == 0.0
    queue.enqueue(features(0, 2), step=10)
    assert queue.age(13) == 3.0
    queue.enqueue(features(2, 4), step=12)
    assert queue.age(13) == pytest.approx((2 * 3 + 4 * 1) / 6)
    queue.enqueue(features(6, 2), step=13)  # over the two oldest
    assert queue.age(13) == pytest.approx((4 * 1 + 2 * 0) / 6)


def test_state_goes_on_as_if_nothing_had_happened() -> None:
    queue, restored = FeatureQueue(E, 7, seed=0), FeatureQueue(E, 7, seed=9)
    queue.enqueue(features(0, 5), 0)
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in queue.state_dict().items()}
    restored.load_state_dict(copied)
    for ring in (queue, restored):
        ring.enqueue(features(5, 4), 1)
    assert torch.equal(queue.features.image, restored.features.image)
    assert torch.equal(queue.features.text, restored.features.text)
    assert (queue.pointer, queue.enqueued) == (restored.pointer, restored.enqueued) == (2, 9)
    assert queue.age(3) == restored.age(3)


def test_state_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 7\].*\[3, 8\].*objective\.queue_size"):
        FeatureQueue(E, 8, seed=0).load_state_dict(FeatureQueue(E, 7, seed=0).state_dict())


def test_image_ids_travel_with_their_features() -> None:
    """Image ids follow their features past the wrap and through a checkpoint."""
    queue = FeatureQueue(2, 5, seed=0, with_image_ids=True)
    assert queue.image_ids is not None and queue.image_ids.tolist() == [-100] * 5
    for step, ids in enumerate(([1, 2, 3], [4, 5, 6])):
        features = torch.tensor(ids, dtype=torch.float32)[:, None].repeat(1, 2)
        queue.enqueue(FeaturePair(features, -features), step, torch.tensor(ids))
    assert queue.image_ids.tolist() == [6, 2, 3, 4, 5]
    assert queue.features.image[0].tolist() == [6, 2, 3, 4, 5]
    other = FeatureQueue(2, 5, seed=1, with_image_ids=True)
    other.load_state_dict(queue.state_dict())
    assert other.image_ids is not None and torch.equal(other.image_ids, queue.image_ids)
    assert "image_ids" not in FeatureQueue(2, 5, seed=0).state_dict()
