"""Reading from a real S3 server that stops, fails, corrupts data, or exceeds the local disk."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data_samples import MakeLoader, MakeShards, hurry, stream, take
from faulty_proxy import faulty_proxy
from reading_job import ReadingJob
from s3_server import S3Server

from blip_scale.data.loading.micro_batches import Batch
from blip_scale.data.reading import prefetch
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.storage import objects

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]

SMALL = "32kb"  # a cache of one shard: nearly every batch fetches


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (objects, "FIRST_PAUSE_S"), (objects, "LONGEST_PAUSE_S"), (prefetch, "POLL_S")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))  # undone after the test
    hurry()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=False)
    shutil.rmtree(disk, ignore_errors=True)


def fill(disk: Path, file: Path) -> None:
    """Leave no room for a shard, and drop those that the loader fetched at its start."""
    for shard in (disk / "cache").glob("*.mds"):
        shard.unlink()
    file.write_bytes(bytes(shutil.disk_usage(disk).free - 4096))


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert [batch.ids for batch in batches] == [batch.ids for batch in expected]
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.token_ids, other.token_ids)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_bucket_gives_what_the_folder_gives(
    s3: S3Server,
    make_shards: MakeShards,
    make_loader: MakeLoader,
    tmp_path: Path,
    compression: str | None,
) -> None:
    folder = make_shards("red", 60, compression=compression)
    bucket = [stream(tmp_path / "cache", remote=s3.upload(folder))]
    expected = take(make_loader([stream(folder)]), 14)
    assert_equal(take(make_loader(bucket, workers=2), 14), expected)


def test_the_server_is_stopped_and_started_again(
    s3: S3Server,
    make_shards: MakeShards,
    make_loader: MakeLoader,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = make_shards("red", 60)
    bucket = [stream(tmp_path / "cache", remote=s3.upload(folder))]
    expected = take(make_loader([stream(folder)]), 14)
    loader = make_loader(bucket, cache_limit=SMALL)
    batches = iter(loader)
    read = [next(batches) for _ in range(3)]
    s3.stop()
    restart = threading.Timer(1.0, s3.start)
    restart.start()
    try:
        read += [next(batches) for _ in range(11)]
    finally:
        restart.join()
    loader.close()
    assert_equal(read, expected)
    assert "attempt 3 for" in caplog.text and "failed, retrying in" in caplog.text


def test_one_request_in_twenty_fails(
    s3: S3Server,
    make_shards: MakeShards,
    make_loader: MakeLoader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_shards("red", 60)
    remote = s3.upload(folder)
    expected = take(make_loader([stream(folder)]), 14)
    with faulty_proxy(s3.port, monkeypatch, share=0.05, seed=1) as proxy:
        bucket = [stream(tmp_path / "cache", remote=remote)]
        batches = take(make_loader(bucket, cache_limit=SMALL, workers=1), 14)
        assert proxy.requests > 100
        assert proxy.faults["refused"] and proxy.faults["cut"]
    assert_equal(batches, expected)
    assert not any(batch.skipped for batch in batches)


def test_damaged_and_missing_shards_are_skipped_and_counted_alike_everywhere(
    s3: S3Server, make_shards: MakeShards, make_loader: MakeLoader, tmp_path: Path
) -> None:
    folder = make_shards("red", 90)
    remote = s3.upload(folder)
    store = StreamStore(stream(folder))
    lost = set()
    for shard in (1, 3, 5):
        lost |= {store.read(shard, i)["id"] for i in range(store.shard_samples[shard])}
        content = (folder / store.shard_name(shard)).read_bytes()
        flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        if shard == 1:
            s3.put(f"{remote}/{store.shard_name(shard)}", flipped)
        elif shard == 3:
            s3.put(f"{remote}/{store.shard_name(shard)}", content[: len(content) // 2])
        else:
            s3.delete(f"{remote}/{store.shard_name(shard)}")
    whole = [name for batch in take(make_loader([stream(folder)]), 14) for name in batch.ids]

    runs, counts = [], []
    for ranks, workers in ((1, 2), (2, 1)):
        caches = [
            tmp_path / f"cache-{ranks}-{rank}" for rank in range(ranks)
        ]  # a disk for each rank
        loaders = []
        for rank, cache in enumerate(caches):
            streams = [stream(cache, remote=remote)]
            loaders.append(make_loader(streams, rank, ranks, workers=workers))
        per_rank = [take(loader, 9) for loader in loaders]
        state = loaders[0].state_dict()
        resumed = make_loader([stream(caches[0], remote=remote)], workers=workers)
        resumed.load_state_dict(state)
        steps = [*zip(*per_rank, strict=True), *((batch,) for batch in take(resumed, 5))]
        runs.append([name for step in steps for batch in step for name in batch.ids])
        counts.append(sum(len(batch.skipped) for step in steps for batch in step))
        reports = {line for step in steps for batch in step for line in batch.skipped}
        assert sum("stays damaged, fetched 3 times" in line for line in reports) == 2
        assert sum("can't be fetched, tried 4 times" in line for line in reports) == 1
        assert len(reports) == 3
    assert runs[0] == runs[1]
    assert counts == [sum(name in lost for name in whole)] * 2
    assert not lost & set(runs[0])
    kept = [i for i, name in enumerate(whole) if name not in lost]
    assert [runs[0][i] for i in kept] == [whole[i] for i in kept]


def test_two_nodes_share_a_cache_and_fetch_each_shard_once(
    s3: S3Server,
    make_shards: MakeShards,
    make_loader: MakeLoader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_shards("red", 120)
    remote = s3.upload(folder)
    whole = [name for batch in take(make_loader([stream(folder)]), 15) for name in batch.ids]
    with faulty_proxy(s3.port, monkeypatch, share=0.0) as proxy:
        cache = [stream(tmp_path / "cache", remote=remote)]
        jobs = [ReadingJob(make_loader(cache, rank, 2, workers=2)) for rank in range(2)]
        per_rank = [[job.next_ids() for _ in range(15)] for job in jobs]
        for job in jobs:
            job.kill()
        shards = [n for path, n in proxy.downloads.items() if "shard." in path]
    assert [name for step in zip(*per_rank, strict=True) for ids in step for name in ids] == whole
    assert len(shards) == len(list(folder.glob("shard.*"))) and set(shards) == {1}


def test_a_server_that_stays_away_ends_the_run_with_its_name(
    s3: S3Server, make_shards: MakeShards, make_loader: MakeLoader, tmp_path: Path
) -> None:
    remote = s3.upload(make_shards("red", 60))
    loader = make_loader(
        [stream(tmp_path / "cache", remote=remote)], cache_limit=SMALL, retry_s=2, workers=1
    )
    batches = iter(loader)
    next(batches)
    s3.stop()
    start_s = time.monotonic()
    try:
        with pytest.raises(FileNotFoundError, match=rf"{remote}/shard.* can't be fetched, tried"):
            for _ in range(20):
                next(batches)
        assert time.monotonic() - start_s < 15
    finally:
        s3.start()


def test_what_is_forbidden_or_missing_is_said_at_once(
    s3: S3Server,
    make_shards: MakeShards,
    make_loader: MakeLoader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = s3.upload(make_shards("red", 20))
    with pytest.raises(FileNotFoundError, match=r"nowhere/index.json .* 4 times .*make it with"):
        make_loader([stream(tmp_path / "a", remote=f"s3://{s3.bucket}/nowhere")])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(FileNotFoundError, match=r"index.json can't be fetched, tried 4 times"):
        make_loader([stream(tmp_path / "b", remote=remote)])


def test_a_full_disk_drops_what_is_not_in_use(
    s3: S3Server,
    make_shards: MakeShards,
    make_loader: MakeLoader,
    small_disk: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = make_shards("red", 160)
    assert sum(path.stat().st_size for path in folder.iterdir()) > 3 * 64 * 1024
    bucket = [stream(small_disk / "cache", remote=s3.upload(folder))]
    expected = take(make_loader([stream(folder)]), 20)
    assert_equal(take(make_loader(bucket), 20), expected)
    assert_equal(take(make_loader(bucket, workers=2), 20), expected)
    assert "is full at" in caplog.text and "set data.cache_limit" in caplog.text


def test_room_that_another_fetch_takes_is_waited_for(
    s3: S3Server, make_shards: MakeShards, make_loader: MakeLoader, small_disk: Path
) -> None:
    folder = make_shards("red", 60)
    loader = make_loader([stream(small_disk / "cache", remote=s3.upload(folder))])
    others = small_disk / "cache" / "shard.99999.mds.partial"
    fill(small_disk, others)
    threading.Timer(1.5, others.unlink).start()
    assert_equal(take(loader, 5), take(make_loader([stream(folder)]), 5))


def test_a_disk_that_is_full_of_other_things_is_named(
    s3: S3Server, make_shards: MakeShards, make_loader: MakeLoader, small_disk: Path
) -> None:
    bucket = [stream(small_disk / "cache", remote=s3.upload(make_shards("red", 60)))]
    loader = make_loader(bucket, workers=1)
    fill(small_disk, small_disk / "others")
    with pytest.raises(OSError, match=r"^stream 'red': the disk of .*/cache is full .*make roo"):
        take(loader, 1)
