"""The global order of samples, tested without files."""

from __future__ import annotations

import copy
import hashlib
import itertools
import multiprocessing
import os
import tracemalloc
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from blip_scale.data.loading.block_layouts import BlockKey, BlockLayouts
from blip_scale.data.loading.order import SampleOrder, Slot, StreamShape
from blip_scale.data.loading.seeds import generators

Place = tuple[int, int, int]


def place(slot: Slot) -> Place:
    return slot.stream, slot.shard, slot.sample


def places(slots: Iterable[Slot]) -> set[Place]:
    return {place(slot) for slot in slots}


def pairs(places: np.ndarray) -> list[tuple[int, int]]:
    """Stream and shard of each shard, where it comes first."""
    return list(dict.fromkeys((stream, shard) for stream, shard in places.tolist()))


def epoch_slots(order: SampleOrder, epoch: int) -> list[Slot]:
    return [order.locate(epoch, position) for position in range(order.samples_per_epoch)]


@pytest.mark.parametrize("block_samples", [7, 40, 10_000])
def test_every_sample_comes_once_an_epoch_and_in_another_order(block_samples: int) -> None:
    shapes = [StreamShape("a", (10, 10, 3), 23), StreamShape("b", (5, 0, 25), 30)]
    order = SampleOrder(shapes, seed=3, block_samples=block_samples)
    expected = set()
    for number, shape in enumerate(shapes):
        for shard, samples in enumerate(shape.shard_samples):
            expected |= {(number, shard, i) for i in range(samples)}
    first, second = epoch_slots(order, 0), epoch_slots(order, 1)
    assert len(first) == len(expected) == 53
    assert places(first) == places(second) == expected
    assert first != second


def test_any_position_is_found_without_what_came_before() -> None:
    shapes = [StreamShape("a", (10,) * 9, 90), StreamShape("b", (4, 6), 25)]
    in_row = epoch_slots(SampleOrder(shapes, seed=0, block_samples=20), 2)
    jumping = SampleOrder(shapes, seed=0, block_samples=20)
    jumping.locate(5, 1)
    for position in (110, 3, 64, 63, 0):
        assert jumping.locate(2, position) == in_row[position]


def test_repeats_are_counted_and_fractions_take_turns() -> None:
    shapes = [
        StreamShape("twice", (6, 6), 24),
        StreamShape("half", (7, 7, 7), 10),
        StreamShape("fifth", (5,) * 8, 8),
    ]
    order = SampleOrder(shapes, seed=9, block_samples=10_000)
    seen: Counter[Place] = Counter()
    halves = []
    for epoch in range(10):
        slots = epoch_slots(order, epoch)
        counts = Counter(slot.stream for slot in slots)
        assert counts == {0: 24, 1: 10, 2: 8}
        assert set(Counter(place(slot) for slot in slots if slot.stream == 0).values()) == {2}
        halves.append(places(slot for slot in slots if slot.stream == 1))
        seen.update(place(slot) for slot in slots)
    assert not halves[0] & halves[1], "two halves of one pass do not overlap"
    assert {seen[spot] for spot in seen if spot[0] == 2} == {2}, "five epochs read each sample once"
    assert max(seen[spot] for spot in seen if spot[0] == 1) <= 5


def test_each_pass_reads_each_sample_once() -> None:
    shapes = [StreamShape("often", (6, 5), 27), StreamShape("seldom", (8, 9), 6)]
    order = SampleOrder(shapes, seed=4, block_samples=12)
    slots = [slot for epoch in range(11) for slot in epoch_slots(order, epoch)]
    assert len(set(slots)) == len(slots), "never the same sample twice in one pass"
    passes = Counter((slot.stream, slot.passing) for slot in slots)
    assert passes == {
        **{(0, p): 11 for p in range(27)},
        **{(1, p): 17 for p in range(3)},
        (1, 3): 15,
    }


@pytest.mark.parametrize("block_samples", [7, 20, 10_000])
def test_what_comes_is_known_before(block_samples: int) -> None:
    shapes = [StreamShape("a", (5, 4, 6), 15), StreamShape("b", (3, 8), 22)]
    order = SampleOrder(shapes, seed=1, block_samples=block_samples)
    start = (2, 11)
    row = [(2, at) for at in range(11, 37)] + [(e, at) for e in (3, 4) for at in range(37)]
    blocks = list(dict.fromkeys(order.block_of(*at) for at in row))
    expected = []
    for block in blocks:
        slots = [order.locate(*at) for at in row if order.block_of(*at) == block]
        expected.append(list(dict.fromkeys((slot.stream, slot.shard) for slot in slots)))
    upcoming = [pairs(places) for places in itertools.islice(order.upcoming(*start), len(blocks))]
    assert upcoming[0] == expected[0], "the rest of the block, by first use"
    assert list(map(sorted, upcoming)) == list(map(sorted, expected))


def test_the_seed_matters_and_streams_are_mixed() -> None:
    shapes = [StreamShape("a", (50,), 50), StreamShape("b", (50,), 50)]
    first = epoch_slots(SampleOrder(shapes, seed=0, block_samples=100), 0)
    assert first != epoch_slots(SampleOrder(shapes, seed=1, block_samples=100), 0)
    assert 10 < sum(slot.stream for slot in first[:50]) < 40


def test_a_position_outside_the_epoch_is_refused() -> None:
    with pytest.raises(IndexError, match="position 5 in an epoch of 5"):
        SampleOrder([StreamShape("a", (5,), 5)], seed=0, block_samples=5).locate(0, 5)


GOLDEN = {
    "0d04da411388f55c4f588687da1e48819c92d3353341846f5551b2cf00f8aa74": (
        [("coco", (113, 0, 250, 7), 370), ("vg", (64,) * 9, 1200), ("laion", range(1, 60), 700)],
        42,
        500,
        3,
    ),
    "a7b12d83d381a7f18e1899e273d177898663567f80688b877474047e5286041d": (
        [("one", (5, 4, 6), 15)], 0, 10_000, 4
    ),
    "c3712e55878c96747bcdb1be01d3f438700b0fe2654cecde90f30b825d5d61f9": (
        [("half", (31,) * 40, 411), ("often", (3, 8), 97)], 7, 64, 5
    ),
}  # fmt: skip
"""sha256 of the slots of all epochs and of what is upcoming -> streams, seed, block, epochs."""


@pytest.mark.parametrize("expected", GOLDEN)
def test_the_order_is_that_of_older_checkpoints(expected: str) -> None:
    """A run that was begun with an older version goes on with the same samples."""
    streams, seed, block_samples, epochs = GOLDEN[expected]
    shapes = [StreamShape(name, tuple(sizes), count) for name, sizes, count in streams]
    order = SampleOrder(shapes, seed, block_samples)
    hasher = hashlib.sha256()
    for epoch in range(epochs):
        for slot in epoch_slots(order, epoch):
            line = f"{slot.stream} {slot.shard} {slot.sample} {slot.passing}\n"
            hasher.update(line.encode())
    coming = itertools.islice(order.upcoming(1, order.samples_per_epoch // 3), 5)
    first, *others = map(pairs, coming)
    hasher.update(repr([first, [sorted(shards) for shards in others]]).encode())
    assert hasher.hexdigest() == expected


@pytest.mark.parametrize("words", [4, 5, 7])
def test_seeds_that_are_made_together_are_those_of_numpy(words: int) -> None:
    shared = np.arange(2**32 - 3, 2**32 - 3 + words).astype(np.uint32)
    last = np.array([0, 1, 399_999, 2**32 - 1], np.uint32)
    for number, rng in zip(last, generators(shared, last), strict=True):
        expected = np.random.default_rng([*shared.tolist(), int(number)])
        assert rng.bit_generator.state == expected.bit_generator.state


def test_workers_share_the_layout_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [StreamShape("a", (10,) * 9, 90)]
    order = SampleOrder(shapes, seed=0, block_samples=20)
    expected = epoch_slots(SampleOrder(shapes, seed=0, block_samples=20), 1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(epoch_slots, (order, 1)) == expected, "it makes all five blocks"
    made = []
    lay_out = SampleOrder._compute_layout

    def counted(self: SampleOrder) -> np.ndarray:
        made.append(self._block)
        return lay_out(self)

    monkeypatch.setattr(SampleOrder, "_compute_layout", counted)
    for reader in (order, copy.copy(order)):
        assert [reader.locate(1, place) for place in range(20, 90)] == expected[20:]
    assert made == [], "those of the last four blocks are taken"
    assert order.locate(1, 0) == expected[0]
    assert made == [0], "a block that has left the file is made again"


def test_a_worker_that_is_killed_leaves_no_layout_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = BlockLayouts(4)
    layout, block = np.arange(8, dtype=np.int32).reshape(4, 2), BlockKey(0, 1, 4)
    write, writes = os.pwrite, []

    def killed(file: int, data: bytes, place: int) -> int:
        writes.append(place)
        if len(writes) == 2:  # the data are there, but not what they are
            raise KeyboardInterrupt
        return write(file, data, place)

    monkeypatch.setattr(os, "pwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        layouts.get(block, range(4), lambda: layout + 1)
    assert layouts.get(block, range(4), lambda: layout).tolist() == layout.tolist()
    assert layouts.get(block, range(1, 3), lambda: layout + 1).tolist() == layout[1:3].tolist()


def test_an_epoch_of_400_million_samples_is_held_by_its_shards() -> None:
    shards, each = 400_000, 1_000
    tracemalloc.start()
    shape = StreamShape("laion", np.full(shards, each), shards * each)
    order = SampleOrder([shape], seed=0, block_samples=262_144)
    slots = [order.locate(0, position) for position in (0, 123_456_789, shards * each - 1)]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(slots)) == 3
    assert held < 10e6 and peak < 40e6
