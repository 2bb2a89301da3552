"""Batch size and mixture change between two parts of a run: what each epoch reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from data_samples import MakeLoader, MakeShards, stream, take

from blip_scale.data.loading.course import CHANGEABLE, Course, Part
from blip_scale.data.loading.loader import TrainLoader

BOTH = frozenset(CHANGEABLE.values())


def ids(loader: TrainLoader, count: int) -> list[str]:
    """Ids of the next `count` batches."""
    return [name for batch in take(loader, count) for name in batch.ids]


def of(name: str, count: int) -> set[str]:
    return {f"{name}-{number}" for number in range(count)}


@pytest.fixture
def red(make_shards: MakeShards) -> Path:
    return make_shards("red", 45)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_batch_size_goes_on_in_the_same_order(
    red: Path, make_loader: MakeLoader, workers: int
) -> None:
    """Only the samples that are fewer than a batch are left out, as at the end of each epoch."""
    first = make_loader([stream(red)], global_batch=8)
    seen = ids(first, 3)
    order = ids(make_loader([stream(red)], global_batch=1), 90)
    second = make_loader([stream(red)], global_batch=5, workers=workers)
    second.load_state_dict(first.state_dict(), {"train.global_batch_size"})
    assert second.scheduled_steps == 9 - 4  # four steps are left of an epoch of nine
    rest = ids(second, 4)
    assert seen + rest == order[:44]
    assert second.samples_seen == 44 and second.scheduled_steps == 9
    third = make_loader([stream(red)], rank=1, world_size=5, global_batch=5)
    third.load_state_dict(second.state_dict())
    assert ids(third, 9) == order[46::5]  # whole epochs of 45 again, on five ranks
    assert third.scheduled_steps == 18


def test_a_change_is_refused_unless_it_is_named(
    red: Path, make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    state = make_loader([stream(red)]).state_dict()
    larger = make_loader([stream(red)], global_batch=9)
    for allowed in ((), {"data.streams"}):
        with pytest.raises(
            ValueError, match=r"size was 8 and is 9 now; .* --allow-change train\.gl"
        ):
            larger.load_state_dict(state, allowed)
    more = make_loader([stream(red), stream(make_shards("blue", 24))])
    with pytest.raises(ValueError, match=r"streams was \[\['red'.* --allow-change data\.streams"):
        more.load_state_dict(state, {"train.global_batch_size"})
    with pytest.raises(ValueError, match="seed was 1 and is 2 now; undo the change or start"):
        make_loader([stream(red)], seed=2).load_state_dict(state, BOTH)


def test_a_stream_joins_with_the_next_epoch(
    red: Path, make_shards: MakeShards, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_loader([stream(red)])
    seen = ids(first, 2)
    mixture = [stream(make_shards("blue", 24)), stream(red)]
    second = make_loader(mixture, global_batch=4)
    second.load_state_dict(first.state_dict(), BOTH)
    assert "28 samples of epoch 0 follow in the old order, then epoch 1 begins" in caplog.text
    rest = ids(second, 7)
    assert Counter(seen + rest).most_common(1)[0][1] == 1
    assert len(of("red", 45) - {*seen, *rest}) == 1  # fewer than a batch
    third = make_loader(mixture, global_batch=4)
    third.load_state_dict(second.state_dict())
    assert Counter(ids(third, 17)).most_common(1)[0][1] == 1
    assert third.state_dict()["samples_seen"] == 16 + 28 + 68


def test_a_stream_that_leaves_ends_the_epoch(
    red: Path, make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    first = make_loader([stream(red), stream(make_shards("blue", 24))])
    ids(first, 3)
    second = make_loader([stream(red)], global_batch=5)
    second.load_state_dict(first.state_dict(), BOTH)
    assert second.scheduled_steps == 9  # the second epoch begins
    assert set(ids(second, 9)) == of("red", 45)


def test_a_stream_that_is_read_in_parts_goes_on_where_it_was(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    """A change between two epochs costs nothing: the new mixture has the next one."""
    half = stream(make_shards("green", 40), repeat=0.5)
    first = make_loader([half], global_batch=4)
    seen = ids(first, 5)
    second = make_loader([half, stream(make_shards("blue", 24))], global_batch=4)
    second.load_state_dict(first.state_dict(), {"data.streams"})
    read = ids(second, 11)
    assert {name for name in [*seen, *read] if name.startswith("green")} == of("green", 40)
    assert of("blue", 24) < set(read)
    assert len(read) == len(set(read))


def test_a_second_change_in_the_same_epoch() -> None:
    course = Course.from_start([Part("a", 100, 100)], 10)
    course = course.changed([Part("a", 100, 50), Part("b", 30, 30)], 8, 20)
    assert (course.epoch, course.position, course.rest) == (0, 20, 80)
    again = course.changed([Part("a", 100, 50), Part("b", 30, 60)], 7, 36)
    assert (again.epoch, again.position, again.rest) == (0, 36, 63)
    assert again.former == (Part("a", 100, 100),)
    assert [part.reached(1) for part in again.parts] == [100, 0]
    assert again.locate(36) == (True, 0, 36) and again.locate(99) == (False, 1, 0)
    parts = [part._replace(offset=0) for part in again.parts]
    assert Course.from_json(parts, 7, again.to_json()) == again


def test_a_stream_of_another_size_begins_a_new_pass() -> None:
    course = Course.from_start([Part("a", 100, 30)], 10)
    course = course.changed([Part("a", 110, 30)], 10, 70)  # in the third epoch, of 30
    assert course.parts[0].reached(3) == 110
    assert (course.epoch, course.rest) == (2, 0)


def test_the_schedule_never_goes_back() -> None:
    """The rest of a long epoch counts as at most an epoch of the new mixture."""
    course = Course.from_start([Part("a", 1000, 1000)], 10)
    course = course.changed([Part("a", 1000, 100)], 10, 1300)
    assert (course.epoch, course.rest) == (1, 700)
    assert course.scheduled_steps(1300) == 10
    assert course.scheduled_steps(1400) == 20
