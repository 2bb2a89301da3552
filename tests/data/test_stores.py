"""Local shards, and shards fetched into a cache: faults, leftovers, other processes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from data_samples import MakeLoader, MakeShards, jpeg, stream, take
from reading_job import ReadingJob

from blip_scale.config.recipe import DataRecipe, StreamRecipe
from blip_scale.data.mds import FileInfo
from blip_scale.data.reading import cache as caching
from blip_scale.data.reading import stream_store
from blip_scale.data.reading.cache import ShardCache
from blip_scale.data.reading.fetching import Fetcher
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.reading.streams import open_streams
from blip_scale.data.shards import Record, write_shards
from blip_scale.errors import RefusedInput
from blip_scale.storage import objects


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.0)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("shard.*"))


def all_ids(store: StreamStore) -> list[str]:
    ids = []
    for shard, count in enumerate(store.shard_samples):
        ids += [store.read(shard, sample)["id"] for sample in range(count)]
    return ids


def test_a_set_is_whole_or_not_there(tmp_path: Path) -> None:
    def failing() -> object:
        yield Record("a", jpeg(0), "a", "test")
        raise OSError("the reader broke")

    with pytest.raises(OSError, match="the reader broke"):
        write_shards(tmp_path / "set", failing())  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
    assert write_shards(tmp_path / "set", [Record("a", jpeg(0), "a", "test")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    with pytest.raises(FileExistsError, match="remove it or choose another"):
        write_shards(tmp_path / "set", [])
    with pytest.raises(ValueError, match="no record to write"):
        write_shards(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="the id 'a' occurs twice"):
        write_shards(tmp_path / "twice", [Record("a", b"", "", "")] * 2)


def test_a_cache_belongs_to_one_remote(tmp_path: Path, make_shards: MakeShards) -> None:
    """Shards of two sets have the same names, so one would be read for the other."""
    first, second = make_shards("first", 4), make_shards("second", 4)
    shared = tmp_path / "cache"
    ids = all_ids(StreamStore(StreamRecipe("a", str(shared), str(first))))
    pattern = rf"stream 'b': the cache {shared} holds shards of {first}, not of {second}: give the"
    with pytest.raises(RefusedInput, match=pattern):
        StreamStore(StreamRecipe("b", str(shared), str(second)))
    assert all_ids(StreamStore(StreamRecipe("again", str(shared), f"{first}/"))) == ids
    (shared / "remote.txt").unlink()  # a cache from before the remote was recorded
    assert all_ids(StreamStore(StreamRecipe("older", str(shared), str(first)))) == ids
    assert (shared / "remote.txt").read_text() == f"{first}\n"


def test_a_missing_folder_names_the_command(tmp_path: Path, make_loader: MakeLoader) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"stream 'none': .*none; make it with `make the data`"
    ):
        make_loader([stream(tmp_path / "none")])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_named(
    make_shards: MakeShards, make_loader: MakeLoader, workers: int
) -> None:
    folder = make_shards("red", 30)
    loader = make_loader([stream(folder)], workers=workers)
    shard = first_shard(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"^stream 'red': shard {shard} is missing"):
        make_loader([stream(folder)])
    with pytest.raises(
        FileNotFoundError, match=rf"^stream 'red': shard {shard} is missing; make it"
    ):
        take(loader, 3)


def test_a_truncated_shard_is_named(make_shards: MakeShards, make_loader: MakeLoader) -> None:
    folder = make_shards("red", 30)
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"shard {shard} is damaged: \d+ bytes, not \d+"):
        take(make_loader([stream(folder)]), 3)


def test_a_bad_index_is_named(make_shards: MakeShards, make_loader: MakeLoader) -> None:
    folder = make_shards("red", 8)
    index = folder / "index.json"
    text = index.read_text()
    index.write_text(text[:-9])
    with pytest.raises(ValueError, match=r"stream 'red': .*index.json is not an MDS index"):
        make_loader([stream(folder)])
    index.write_text(text.replace('"captions"', '"titles"'))
    with pytest.raises(ValueError, match=r"the shards lack the columns \['captions'\]"):
        make_loader([stream(folder)])


def test_streams_are_checked(make_shards: MakeShards, make_loader: MakeLoader) -> None:
    with pytest.raises(ValueError, match=r"data\.streams is empty"):
        make_loader([])
    folder = make_shards("red", 8)
    with pytest.raises(ValueError, match="names must differ"):
        make_loader([stream(folder), stream(folder)])


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_remote_is_cached(
    make_shards: MakeShards, make_loader: MakeLoader, tmp_path: Path, compression: str | None
) -> None:
    remote, cache = make_shards("red", 40, compression=compression), tmp_path / "cache"
    streams = [stream(cache, remote=remote)]
    fetched = take(make_loader(streams, workers=2), 5)
    assert {name for batch in fetched for name in batch.ids} == {f"red-{i}" for i in range(40)}
    kept = sorted(path.name for path in cache.iterdir() if not path.name.startswith(".lock"))
    shards = len(list(remote.glob("shard.*")))
    assert kept == ["index.json", "remote.txt", *(f"shard.{i:05}.mds" for i in range(shards))]
    shutil.rmtree(remote)
    assert [batch.ids for batch in take(make_loader(streams), 5)] == [
        batch.ids for batch in fetched
    ]


def test_compressed_shards_are_read_where_they_lie(make_shards: MakeShards) -> None:
    folder = make_shards("red", 20, compression="zstd")
    assert all_ids(StreamStore(stream(folder))) == [f"red-{i}" for i in range(20)]


@pytest.mark.usefixtures("no_waiting")
def test_a_damaged_download_is_fetched_again(
    make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StreamStore(stream(tmp_path / "cache", remote=make_shards("red", 20)))
    download, calls = Fetcher._download, []

    def stuttering(self: Fetcher, source: str, target: Path, info: FileInfo | None) -> None:
        calls.append(source)
        if len(calls) == 1:
            raise ConnectionError("reset by peer")
        download(self, source, target, info)
        if len(calls) == 2:
            data = bytearray(target.read_bytes())
            data[-5] ^= 1
            target.write_bytes(data)

    monkeypatch.setattr(Fetcher, "_download", stuttering)
    assert all_ids(store) == [f"red-{i}" for i in range(20)]
    assert len(calls) == len(store.shards) + 2


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("no_waiting")
def test_a_shard_that_is_not_there_is_named(make_shards: MakeShards, tmp_path: Path) -> None:
    """Other samples replace the shard's; without an index, the set is unreachable."""
    remote = make_shards("red", 20)
    store, later = (
        StreamStore(stream(tmp_path / cache, remote=remote), "make the data") for cache in "ab"
    )
    shard = first_shard(remote)
    shard.unlink()
    problem = rf"{shard} can't be fetched, tried 4 times \(FileN"
    for _ in range(2):
        with pytest.raises(stream_store.DamagedShard, match=rf"^red/shard.00000.mds: {problem}"):
            store.read(0, 0)
    assert not list((tmp_path / "a").glob("shard.*"))
    assert store.read(1, 0)["id"].startswith("red-")
    remote.rename(remote.with_name("moved"))
    with pytest.raises(FileNotFoundError, match=rf"^stream 'red': {problem}"):
        later.read(0, 0)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_shard_that_stays_damaged_is_replaced_alike_on_all_ranks(
    make_shards: MakeShards,
    make_loader: MakeLoader,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    compression: str | None,
) -> None:
    remote = make_shards("red", 45, compression=compression)
    whole = [name for batch in take(make_loader([stream(remote)]), 10) for name in batch.ids]
    store = StreamStore(stream(tmp_path / "whole", remote=remote))

    def shard_ids(shard: int) -> set[str]:
        return {store.read(shard, i)["id"] for i in range(store.shard_samples[shard])}

    lost, stand_ins = shard_ids(2), shard_ids(3)
    flip_a_bit(remote / f"shard.00002.mds{'.zstd' if compression else ''}")
    runs = []
    for ranks in (1, 2):
        streams = [stream(tmp_path / f"cache-{ranks}", remote=remote)]
        per_rank = [take(make_loader(streams, rank, ranks), 10) for rank in range(ranks)]
        runs.append([name for step in zip(*per_rank, strict=True) for b in step for name in b.ids])
        skipped = [line for batches in per_rank for batch in batches for line in batch.skipped]
        assert len(skipped) == sum(name in lost for name in whole)
        assert len(set(skipped)) == 1 and "red/shard.00002.mds: " in skipped[0]
    assert "red/shard.00002.mds" in skipped[0] and "stays damaged, fetched 3 times" in skipped[0]
    assert runs[0] == runs[1]
    for before, now in zip(whole, runs[0], strict=True):
        assert now == before if before not in lost else now in stand_ins
    assert f"its {len(lost)} samples are replaced by others" in caplog.text


@pytest.mark.usefixtures("no_waiting")
def test_a_remote_that_is_all_damaged_is_an_error(
    make_shards: MakeShards, make_loader: MakeLoader, tmp_path: Path
) -> None:
    remote = make_shards("red", 30)
    for path in remote.glob("shard.*"):
        flip_a_bit(path)
    loader = make_loader([stream(tmp_path / "cache", remote=remote)])
    with pytest.raises(ValueError, match="stream 'red': too many damaged shards in a row"):
        take(loader, 1)


def test_a_remote_that_was_written_anew_is_fetched_anew(
    make_shards: MakeShards, tmp_path: Path
) -> None:
    remote = make_shards("red", 20)
    recipe = stream(tmp_path / "cache", remote=remote)
    assert all_ids(StreamStore(recipe))[0] == "red-0"
    shutil.rmtree(remote)
    make_shards("new", 20).rename(remote)
    assert all_ids(StreamStore(recipe)) == [f"new-{i}" for i in range(20)]


def test_the_cache_stays_below_its_limit(make_shards: MakeShards, tmp_path: Path) -> None:
    remote, cache = make_shards("red", 60), tmp_path / "cache"
    index = json.loads((remote / "index.json").read_text())
    sizes = [entry["raw_data"]["bytes"] for entry in index["shards"]]
    limit = 3 * max(sizes)
    store = StreamStore(stream(cache, remote=remote), cache=ShardCache([cache], limit))
    assert len(sizes) > 4
    for _ in range(2):
        for shard in range(len(sizes)):
            assert store.read(shard, 0)["source"] == "red"
            assert sum(path.stat().st_size for path in cache.glob("shard.*")) <= limit


def test_a_large_cache_is_not_listed_for_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache([tmp_path], limit_bytes=400 * 10)
    listed = []
    entries = ShardCache._entries

    def counted(cache: ShardCache) -> list[tuple[int, int, Path]]:
        listed.append(1)
        return entries(cache)

    monkeypatch.setattr(ShardCache, "_entries", counted)
    for number in range(1000):
        partial = tmp_path / "new.partial"
        partial.write_bytes(bytes(10))
        cache.admit(partial, tmp_path / f"shard.{number:05}.mds")
        held = {path.name for path in tmp_path.glob("shard.*")}
        assert f"shard.{number:05}.mds" in held and len(held) <= 400
    assert len(held) > 390
    assert "shard.00999.mds" in held and "shard.00500.mds" not in held
    assert len(listed) < 1000 / 5


@pytest.mark.parametrize("text", ["", "x", "5", "5 nan", "5 9e99", "1e9 1", "-3 0"])
def test_a_damaged_count_of_the_cache_is_made_again(tmp_path: Path, text: str) -> None:
    cache = ShardCache([tmp_path], limit_bytes=100)
    for number in range(12):
        partial = tmp_path / "new.partial"
        partial.write_bytes(bytes(20))
        cache.admit(partial, tmp_path / f"shard.{number:05}.mds")
        (tmp_path / ".locks" / "held").write_text(text)
        assert len(list(tmp_path.glob("shard.*"))) == min(number + 1, 5)


def test_shards_of_another_job_are_counted_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache([tmp_path], limit_bytes=100)
    for number in range(9):
        if number == 4:
            for other in range(5):
                (tmp_path / f"shard.9000{other}.mds").write_bytes(bytes(20))
            monkeypatch.setattr(caching, "_COUNT_EVERY_S", 0.0)
        partial = tmp_path / "new.partial"
        partial.write_bytes(bytes(20))
        cache.admit(partial, tmp_path / f"shard.{number:05}.mds")
    assert len(list(tmp_path.glob("shard.*"))) == 5


@pytest.mark.multiprocess
def test_what_a_killed_job_leaves_behind_stops_nobody(
    make_shards: MakeShards, make_loader: MakeLoader, tmp_path: Path
) -> None:
    remote, cache = make_shards("red", 60), tmp_path / "cache"
    streams = [stream(cache, remote=remote)]
    expected = [batch.ids for batch in take(make_loader([stream(remote)], workers=1), 6)]
    shared_memory = set(Path("/dev/shm").iterdir())
    job = ReadingJob(make_loader(streams, workers=2))
    assert job.next_ids() == expected[0]
    made = set(Path("/dev/shm").iterdir()) - shared_memory
    job.kill()
    # A process killed during a download leaves these files, and lock files.
    victim = max(cache.glob("shard.*.mds"))
    victim.unlink()
    for suffix in (".part", ".part.tmp", ".part.1a2b", ".partial"):
        victim.with_name(victim.name + suffix).write_bytes(b"half")
    assert list(cache.glob(".locks/*"))
    start_s = time.monotonic()
    assert [batch.ids for batch in take(make_loader(streams, workers=2), 6)] == expected
    assert time.monotonic() - start_s < 60, "nobody waits for a lock of the dead"
    while left := made & set(Path("/dev/shm").iterdir()):  # the cleanup comes later
        if all("torch" in file.name for file in left):
            break
        assert time.monotonic() - start_s < 90, left


@pytest.mark.multiprocess
def test_jobs_side_by_side_do_not_disturb_each_other(
    make_shards: MakeShards, make_loader: MakeLoader, tmp_path: Path
) -> None:
    remote = make_shards("red", 60)
    expected = []
    for seed in (1, 2):
        batches = take(make_loader([stream(remote)], seed=seed), 6)
        expected.append([batch.ids for batch in batches])
    streams = [stream(tmp_path / "cache", remote=remote)]  # one cache for both
    jobs = [ReadingJob(make_loader(streams, seed=seed, workers=1)) for seed in (1, 2)]
    received = [[job.next_ids() for _ in range(6)] for job in jobs]
    for job in jobs:
        job.kill()
    assert received == expected


def test_the_launchers_variables_do_not_matter(
    make_shards: MakeShards, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DeepSpeed's launcher sets these but not LOCAL_WORLD_SIZE, which Streaming's loader needs.
    streams = [stream(make_shards("red", 40))]
    expected = [batch.ids for batch in take(make_loader(streams, 1, 2), 3)]
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [batch.ids for batch in take(make_loader(streams, 1, 2, workers=1), 3)] == expected


def test_folders_may_name_variables(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shards("red", 8)
    monkeypatch.setenv("SETS", str(folder.parent))
    recipe = stream(Path("$SETS/red"))
    assert open_streams(DataRecipe(streams=[recipe]))[0].folder == folder
