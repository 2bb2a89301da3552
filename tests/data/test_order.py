"""The global order of samples, without any file."""

from __future__ import annotations

from collections import Counter

import pytest

from blip_scale.data.order import SampleOrder, Slot, StreamShape


def epoch_slots(order: SampleOrder, epoch: int) -> list[Slot]:
    return [order.locate(epoch, position) for position in range(order.samples_per_epoch)]


@pytest.mark.parametrize("block_samples", [7, 40, 10_000])
def test_every_sample_comes_once_an_epoch_and_in_another_order(block_samples: int) -> None:
    shapes = [StreamShape("a", (10, 10, 3), 1.0), StreamShape("b", (5, 0, 25), 1.0)]
    order = SampleOrder(shapes, seed=3, block_samples=block_samples)
    expected = {
        Slot(s, shard, i)
        for s, shape in enumerate(shapes)
        for shard, n in enumerate(shape.shard_samples)
        for i in range(n)
    }
    first, second = epoch_slots(order, 0), epoch_slots(order, 1)
    assert len(first) == len(expected) == 53
    assert set(first) == set(second) == expected
    assert first != second


def test_any_position_is_found_without_what_came_before() -> None:
    shapes = [StreamShape("a", (10,) * 9, 1.0), StreamShape("b", (4, 6), 2.5)]
    in_row = epoch_slots(SampleOrder(shapes, seed=0, block_samples=20), 2)
    jumping = SampleOrder(shapes, seed=0, block_samples=20)
    jumping.locate(5, 1)
    for position in (110, 3, 64, 63, 0):
        assert jumping.locate(2, position) == in_row[position]


def test_repeats_are_counted_and_fractions_take_turns() -> None:
    shapes = [
        StreamShape("twice", (6, 6), 2.0),
        StreamShape("half", (7, 7, 7), 0.5),
        StreamShape("fifth", (5,) * 8, 0.2),
    ]
    order = SampleOrder(shapes, seed=9)
    seen: Counter[Slot] = Counter()
    halves = []
    for epoch in range(10):
        slots = epoch_slots(order, epoch)
        counts = Counter(slot.stream for slot in slots)
        assert counts == {0: 24, 1: 10, 2: 8}
        assert set(Counter(slot for slot in slots if slot.stream == 0).values()) == {2}
        halves.append({slot for slot in slots if slot.stream == 1})
        seen.update(slots)
    assert not halves[0] & halves[1], "two halves of one pass do not overlap"
    assert {seen[slot] for slot in seen if slot.stream == 2} == {2}, (
        "five epochs read each sample once"
    )
    assert max(seen[slot] for slot in seen if slot.stream == 1) <= 5


def test_the_seed_matters_and_streams_are_mixed() -> None:
    shapes = [StreamShape("a", (50,), 1.0), StreamShape("b", (50,), 1.0)]
    first = epoch_slots(SampleOrder(shapes, seed=0), 0)
    assert first != epoch_slots(SampleOrder(shapes, seed=1), 0)
    assert 10 < sum(slot.stream for slot in first[:50]) < 40


def test_a_position_outside_the_epoch_is_refused() -> None:
    with pytest.raises(IndexError, match="position 5 in an epoch of 5"):
        SampleOrder([StreamShape("a", (5,), 1.0)], seed=0).locate(0, 5)
