"""TrainLoader: order for any ranks and workers, exact resume, corrupt samples."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from data_samples import MakeLoader, MakeShards, jpeg, stream, take
from torch.utils.data import Dataset

from blip_scale import logs
from blip_scale.config.recipe import HangLimitsRecipe, ImageSizeRecipe
from blip_scale.data.loading.course import Course, Part
from blip_scale.data.loading.micro_batches import Batch, CaptionInput
from blip_scale.data.loading.order import SampleOrder
from blip_scale.data.reading.prefetch import Prefetcher
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import Record, write_shards
from blip_scale.engine.watching import stalls
from blip_scale.engine.watching.hang_limits import HangLimits
from blip_scale.engine.watching.stalls import StallTimer


def equal(first: Batch, second: Batch) -> bool:
    return (
        first.ids == second.ids
        and first.captions == second.captions
        and torch.equal(first.images, second.images)
        and torch.equal(first.token_ids, second.token_ids)
        and torch.equal(first.offsets, second.offsets)
    )


@pytest.mark.multiprocess
def test_the_global_order_is_the_same_for_any_ranks_and_workers(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    streams = [stream(make_shards("red", 45)), stream(make_shards("blue", 30), repeat=0.5)]
    steps = 16  # more than two epochs of 60 // 8 = 7 steps
    runs = {}
    for world_size, workers in [(1, 0), (1, 1), (2, 0), (2, 2), (4, 0), (4, 1)]:
        loaders = [
            make_loader(streams, rank, world_size, workers=workers) for rank in range(world_size)
        ]
        per_rank = [take(loader, steps) for loader in loaders]
        run = []
        for batches in zip(*per_rank, strict=True):
            for batch in batches:
                run += zip(batch.ids, batch.images, strict=True)
        runs[world_size, workers] = run
    expected = runs.pop((1, 0))
    for name, run in runs.items():
        assert [sample for sample, _ in run] == [sample for sample, _ in expected], name
        assert all(torch.equal(a[1], b[1]) for a, b in zip(run, expected, strict=True)), name


def test_accumulation_does_not_change_the_global_batch(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    streams = [stream(make_shards("red", 45))]
    whole = [sample for batch in take(make_loader(streams), 5) for sample in batch.ids]
    loaders = [make_loader(streams, rank, 2, micro_batch=2) for rank in range(2)]
    micro = zip(*(take(loader, 10) for loader in loaders), strict=True)
    assert [sample for step in micro for batch in step for sample in batch.ids] == whole


def test_an_epoch_reads_each_sample_once_and_only_whole_batches(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    loader = make_loader([stream(make_shards("red", 45))])
    assert (loader.steps_per_epoch, loader.samples_per_epoch) == (5, 40)
    ids = [[sample for batch in take(loader, 5) for sample in batch.ids] for _ in range(3)]
    assert all(len(set(epoch)) == 40 for epoch in ids)
    assert len({frozenset(epoch) for epoch in ids}) == 3, "the rest that is left out changes"


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_is_exact(
    make_shards: MakeShards, make_loader: MakeLoader, workers: int
) -> None:
    streams = [stream(make_shards("red", 45))]
    uninterrupted = take(make_loader(streams, workers=workers), 12)
    first = make_loader(streams, workers=workers)
    take(first, 7)
    state = first.state_dict()
    assert state["samples_seen"] == 56
    second = make_loader(streams, workers=workers)
    second.load_state_dict(state)
    resumed = take(second, 5)
    assert all(equal(a, b) for a, b in zip(resumed, uninterrupted[7:], strict=True))


def test_image_sizes_follow_the_samples_seen(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    """Sizes change with an optimizer step, for any ranks and micro-batches, and after a resume."""
    settings = {
        "image_sizes": [
            ImageSizeRecipe(size=8, until_epoch=0.5),
            ImageSizeRecipe(size=12, until_epoch=1.4),
        ]
    }
    streams = [stream(make_shards("red", 45))]  # 5 steps an epoch
    whole = take(make_loader(streams, **settings), 9)
    assert [batch.images.shape[-1] for batch in whole] == [8, 8, *[12] * 5, 16, 16]
    first = make_loader(streams, **settings, micro_batch=2)
    parts = take(first, 5)
    assert [batch.images.shape[-1] for batch in parts] == [8] * 5
    second = make_loader(streams, 1, 2, **settings, micro_batch=2)
    second.load_state_dict({**first.state_dict(), "samples_seen": 48})
    parts = take(second, 5)
    assert [batch.images.shape[-1] for batch in parts] == [12, 12, 16, 16, 16]
    assert torch.equal(parts[2].images, whole[7].images[2:4])


def test_resume_on_another_number_of_ranks_goes_on_with_the_same_samples(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    streams = [stream(make_shards("red", 45))]
    whole = take(make_loader(streams), 4)
    state = {**make_loader(streams).state_dict(), "samples_seen": 16}
    loaders = [make_loader(streams, rank, 4) for rank in range(4)]
    for loader in loaders:
        loader.load_state_dict(state)
    parts = [take(loader, 2) for loader in loaders]
    for step in range(2):
        assert [sample for part in parts for sample in part[step].ids] == whole[2 + step].ids


def test_resume_reads_nothing_of_what_went_before(
    make_shards: MakeShards, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blip_scale.data.reading.stream_store import StreamStore

    loader = make_loader([stream(make_shards("red", 45))])
    loader.load_state_dict({**loader.state_dict(), "samples_seen": 24})
    reads = []
    read = StreamStore.read
    monkeypatch.setattr(
        StreamStore, "read", lambda self, *place: (reads.append(place), read(self, *place))[1]
    )
    take(loader, 1)
    assert len(reads) == 8


def test_the_global_random_state_is_neither_used_nor_changed(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    streams = [stream(make_shards("red", 45))]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = take(make_loader(streams, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(equal(a, b) for a, b in zip(take(make_loader(streams), 2), first, strict=True))


def test_augmentation_changes_from_epoch_to_epoch(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    batches = take(make_loader([stream(make_shards("red", 16))], global_batch=16), 2)
    pictures = [dict(zip(batch.ids, batch.images, strict=True)) for batch in batches]
    assert sum(torch.equal(pictures[0][name], pictures[1][name]) for name in pictures[0]) == 0


def test_the_batch_is_packed(
    make_shards: MakeShards, make_loader: MakeLoader, text: CaptionInput
) -> None:
    batch = take(make_loader([stream(make_shards("red", 20))], flip=False, augment=False), 1)[0]
    assert batch.images.shape == (8, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.token_ids.dtype == torch.int64 and batch.offsets.dtype == torch.int32
    assert batch.offsets[0] == 0 and batch.offsets[-1] == len(batch.token_ids)
    assert batch.max_length == batch.offsets.diff().max()
    assert batch.captions == ["a pair, red"] * 8 and batch.sources == ["red"] * 8
    first = batch.token_ids[: batch.offsets[1]].tolist()
    assert text.tokenizer.convert_ids_to_tokens(first) == [
        "[CLS]",
        "a",
        "pair",
        ",",
        "[UNK]",
        "[SEP]",
    ]
    assert equal(batch.to("cpu"), batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_replaced_counted_and_named(
    make_shards: MakeShards, make_loader: MakeLoader, workers: int
) -> None:
    streams = [stream(make_shards("red", 40, corrupt=frozenset({3, 4, 17})))]
    batches = take(make_loader(streams, workers=workers), 5)
    skipped = [line for batch in batches for line in batch.skipped]
    # Sample 4 replaces sample 3 and is corrupt as well, so it is skipped twice.
    named = Counter(line.split(": ")[0].split(" ")[1] for line in skipped)
    assert named == {"red-3": 1, "red-4": 2, "red-17": 1}
    assert all(
        s.startswith("red/shard.0") and "not an image of a known format" in s for s in skipped
    )
    ids = Counter(sample for batch in batches for sample in batch.ids)
    assert set(ids) == {f"red-{i}" for i in range(40)} - {"red-3", "red-4", "red-17"}
    assert sum(ids.values()) == 40
    assert all(equal(a, b) for a, b in zip(take(make_loader(streams), 5), batches, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_without_a_whole_image_is_replaced_and_counted(
    make_shards: MakeShards, make_loader: MakeLoader, workers: int
) -> None:
    """The same samples of the next shard stand in, however often the shard was tried before."""
    folder = make_shards("red", 40)
    first, *_ = StreamStore(stream(folder)).shard_samples.tolist()
    shutil.rmtree(folder)
    images = [bytes(len(jpeg(i))) if i < first else jpeg(i) for i in range(40)]
    records = [Record(f"red-{i}", image, "A pair, red!", "red") for i, image in enumerate(images)]
    write_shards(folder, records, shard_size="20kb")
    batches = take(make_loader([stream(folder)], workers=workers), 5)
    skipped = [line for batch in batches for line in batch.skipped]
    assert len(skipped) == first
    shard = "red/shard.00000.mds"
    beginning = f"{shard}: none of its samples can be decoded, for example {shard}[0] red-0: "
    assert all(line.startswith(beginning) for line in skipped)
    ids = {sample for batch in batches for sample in batch.ids}
    assert ids == {f"red-{i}" for i in range(first, 40)}


def test_a_set_without_a_whole_image_is_an_error(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    streams = [stream(make_shards("red", 20, corrupt=frozenset(range(20))))]
    with pytest.raises(ValueError, match=r"stream 'red': too many damaged shards .*make the set"):
        take(make_loader(streams), 1)


def test_a_batch_that_does_not_fit_is_refused(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    streams = [stream(make_shards("red", 20))]
    with pytest.raises(
        ValueError, match="global_batch_size 32 is larger than an epoch of 20 pairs"
    ):
        make_loader(streams, global_batch=32)
    with pytest.raises(ValueError, match="global_batch_size 8 is not a multiple of 3 ranks"):
        make_loader(streams, world_size=3, micro_batch=2)


def test_resume_with_other_data_is_refused(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    streams = [stream(make_shards("red", 20))]
    state = make_loader(streams).state_dict()
    with pytest.raises(ValueError, match="made with other data: seed was 1 and is 2"):
        make_loader(streams, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"streams was \[\['red', 20, 20\]\] .*name, samples and"):
        make_loader([stream(make_shards("blue", 20))]).load_state_dict(state)
    with pytest.raises(ValueError, match="inside a micro-step"):
        make_loader(streams).load_state_dict({**state, "samples_seen": 4})


def test_close_ends_an_iterator_that_is_still_held(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    loader = make_loader([stream(make_shards("red", 20))], workers=1)
    batches = iter(loader)
    next(batches)
    loader.close()
    assert list(batches) == []


@pytest.mark.multiprocess
def test_a_long_wait_brings_the_stacks_of_the_workers(
    make_shards: MakeShards,
    make_loader: MakeLoader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stalls, "_LONGEST_TICK_S", 0.02)
    monkeypatch.setattr(stalls, "_LONG_WAIT_S", 0.1)
    log = tmp_path / "logs" / "rank_3.log"
    log.parent.mkdir()
    loader = make_loader([stream(make_shards("red", 20))], workers=1)
    loader._set_up_worker = partial(logs.set_up_worker, tmp_path, 3)
    batches = iter(loader)
    next(batches)
    timer = StallTimer(tmp_path, 3, HangLimits(HangLimitsRecipe(), 0.0))
    deadline = time.monotonic() + 60
    with timer.waiting_for_data():
        while "most recent call first" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    timer.close()
    next(batches)  # the worker goes on
    loader.close()


@pytest.mark.multiprocess
def test_killed_workers_are_replaced_and_nothing_is_lost(
    make_shards: MakeShards, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    streams = [stream(make_shards("red", 45))]
    expected = take(make_loader(streams), 24)
    loader = make_loader(streams, workers=2)
    batches = iter(loader)
    read = []
    for batch in batches:
        read.append(batch)
        if len(read) == 2:
            multiprocessing.active_children()[0].kill()
        if len(read) == 13:
            for worker in multiprocessing.active_children():
                worker.kill()
        if len(read) == 18:  # that which starts them, and is missed when the next one is to start
            server = psutil.Process(multiprocessing.active_children()[0].pid).parent()
            assert server is not None
            server.kill()
        if len(read) == 24:
            break
    loader.close()
    assert all(equal(a, b) for a, b in zip(read, expected, strict=True))
    assert "a loader worker died (pid" in caplog.text and "exit code -9" in caplog.text
    assert not multiprocessing.active_children()


@pytest.mark.multiprocess
def test_workers_that_die_again_and_again_end_the_run(
    make_shards: MakeShards, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader([stream(make_shards("red", 45))], workers=1)
    monkeypatch.setattr(loader, "_batches", _Deadly())
    with pytest.raises(RuntimeError, match=r"workers died 3 times in a row .*lower data.workers"):
        next(iter(loader))


_TAKEN = threading.Lock()


def test_a_lock_that_a_thread_of_the_rank_holds_does_not_stop_the_workers(
    make_shards: MakeShards, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked copy of the rank would hold the lock forever."""
    loader = make_loader([stream(make_shards("red", 45))], workers=1)
    monkeypatch.setattr(loader, "_batches", _Locking())
    with _TAKEN:
        assert next(iter(loader)) == 0
    loader.close()


class _Locking(Dataset[int]):
    """Takes a lock before it yields, as most C and C++ code does."""

    prefetcher = Prefetcher([], SampleOrder([], 0, 1))
    course = Course.from_start([Part("red", 45, 45)], 1)
    former = None

    def __getitem__(self, number: int) -> int:
        with _TAKEN:
            return number


class _Deadly(Dataset[None]):
    """Kills the worker that reads from it, as the kernel does when memory runs out."""

    prefetcher = Prefetcher([], SampleOrder([], 0, 1))
    course = Course.from_start([Part("red", 45, 45)], 1)
    former = None

    def __getitem__(self, number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_changes_its_ranks_reads_the_same_row(
    make_shards: MakeShards, make_loader: MakeLoader
) -> None:
    """Three epochs of two streams, interrupted every other step, on changing numbers of ranks."""
    streams = [stream(make_shards("red", 30)), stream(make_shards("blue", 18))]
    whole = [name for batch in take(make_loader(streams), 18) for name in batch.ids]
    row: list[str] = []
    state = make_loader(streams).state_dict()
    for ranks, workers in ((2, 0), (4, 1), (1, 2), (2, 1), (1, 0), (4, 0), (2, 2), (1, 1), (4, 0)):
        loaders = [make_loader(streams, rank, ranks, workers=workers) for rank in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        parts = [take(loader, 2) for loader in loaders]
        row += [name for step in zip(*parts, strict=True) for batch in step for name in batch.ids]
        states = [loader.state_dict() for loader in loaders]
        state = states[0]
        assert all(other == state for other in states)
    assert row == whole
    for epoch in (row[:48], row[48:96], row[96:]):
        assert len(set(epoch)) == 48, "each sample once an epoch"


def test_text_that_the_tokenizer_does_not_know(
    make_shards: MakeShards,
    make_loader: MakeLoader,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """The first rank warns, for local and remote streams."""
    make_loader([stream(make_shards("ab", 20))])
    assert "[UNK]" not in caplog.text
    unknown = make_shards("xyz", 20)
    make_loader([stream(unknown)], rank=1, world_size=2)
    assert "[UNK]" not in caplog.text
    make_loader([stream(unknown)])
    make_loader([stream(tmp_path / "cache", unknown)])
    assert caplog.text.count("% of the tokens of its first captions are [UNK]") == 2
