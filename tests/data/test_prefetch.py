"""Shards are fetched before the order reaches them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_samples import MakeLoader, MakeShards, stream, take

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.loading.order import SampleOrder, StreamShape
from blip_scale.data.reading import prefetch
from blip_scale.data.reading.cache import ShardCache
from blip_scale.data.reading.stream_store import StreamStore


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "POLL_S", 0.01)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shards_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("shard.*.mds")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_without_a_limit_is_filled_before_it_is_read(
    make_shards: MakeShards, make_loader: MakeLoader, tmp_path: Path, workers: int
) -> None:
    remote, cache = make_shards("red", 80), tmp_path / "cache"
    expected = [batch.ids for batch in take(make_loader([stream(remote)]), 10)]
    loader = make_loader([stream(cache, remote=remote)], workers=workers)
    batches = iter(loader)
    first = next(batches).ids
    wait_for(lambda: shards_in(cache) == shards_in(remote))
    shutil.rmtree(remote)
    assert [first, *(next(batches).ids for _ in range(9))] == expected
    loader.close()


@pytest.mark.parametrize(("shuffle_block", "is_small"), [(40, False), (160, True)])
def test_a_cache_that_is_smaller_than_a_block_is_said(
    make_shards: MakeShards,
    make_loader: MakeLoader,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    shuffle_block: int,
    is_small: bool,
) -> None:
    remote = make_shards("red", 80)
    half = sum(path.stat().st_size for path in remote.glob("shard.*")) * 6 // 10
    streams = [stream(tmp_path / "cache", remote=remote)]
    make_loader(streams, cache_limit=str(half), shuffle_block=shuffle_block)
    assert ("lower data.shuffle_block" in caplog.text) == is_small


def test_what_comes_next_is_there_within_the_limit(
    make_shards: MakeShards, make_loader: MakeLoader, tmp_path: Path
) -> None:
    remote, cache = make_shards("red", 160), tmp_path / "cache"
    entries = json.loads((remote / "index.json").read_text())["shards"]
    sizes = {entry["raw_data"]["basename"]: entry["raw_data"]["bytes"] for entry in entries}
    limit = 6 * max(sizes.values())
    shape = StreamShape("red", tuple(entry["samples"] for entry in entries), 160)
    order = SampleOrder([shape], seed=1, block_samples=16)
    loader = make_loader(
        [stream(cache, remote=remote)], shuffle_block=16, cache_limit=str(limit), workers=0
    )
    batches = iter(loader)
    for step in range(20):
        next(batches)
        upcoming = order.upcoming(0, step * 8)
        places = [*next(upcoming), *next(upcoming)[:1]]
        wanted = {f"shard.{shard:05}.mds" for _, shard in places}
        wait_for(lambda wanted=wanted: wanted <= shards_in(cache))  # type: ignore[misc]
        assert sum(sizes[name] for name in shards_in(cache)) <= limit
    loader.close()
    assert len(sizes) > 12


def test_a_fetched_shard_does_not_evict_what_is_read_next(
    make_shards: MakeShards, tmp_path: Path
) -> None:
    remote, folder = make_shards("red", 160), tmp_path / "cache"
    entries = json.loads((remote / "index.json").read_text())["shards"]
    cache = ShardCache([folder], 6 * max(entry["raw_data"]["bytes"] for entry in entries))
    store = StreamStore(StreamRecipe("red", str(folder), str(remote)), cache=cache)
    shape = StreamShape("red", tuple(entry["samples"] for entry in entries), 160)
    order = SampleOrder([shape], seed=1, block_samples=48)
    first = [f"shard.{shard:05}.mds" for _, shard in next(order.upcoming(0, 0))][:4]
    for name in shards_in(remote) - set(first[:1]):
        shutil.copy(remote / name, folder)
    for name in first[1:]:  # used longest ago, and so the first to be evicted
        os.utime(folder / name, (1, 1))
    prefetcher = prefetch.Prefetcher([store], order)
    prefetcher.advance(0, 0)
    wait_for(lambda: (folder / first[0]).exists())
    prefetcher.close()
    assert set(first) <= shards_in(folder)
