"""The cached index: equal to what is parsed, shared with other processes, never trusted."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import MakeShards, jpeg, stream

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data import mds
from blip_scale.data.reading import shard_table
from blip_scale.data.reading.shard_table import CAPTIONS_CACHE, SHARDS_CACHE, open_shards
from blip_scale.data.reading.shared_arrays import SharedArrays
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import Record, read_caption_counts, write_shards


@pytest.fixture
def always_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_table, "CACHED_FROM", 1)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose index was parsed, one entry each time."""
    folders: list[Path] = []
    parse = mds.parse_index

    def counted(folder: Path, content: bytes) -> tuple[list[mds.Shard], dict[str, Any]]:
        folders.append(folder)
        return parse(folder, content)

    monkeypatch.setattr(mds, "parse_index", counted)
    return folders


def read_all(store: StreamStore) -> list[str]:
    counts = store.shard_samples.tolist()
    return [store.read(shard, i)["id"] for shard, count in enumerate(counts) for i in range(count)]


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_the_cached_table_is_what_the_index_says(
    make_shards: MakeShards, parsed: list[Path], compression: str | None
) -> None:
    folder = make_shards("red", 40, compression=compression)
    expected = mds.read_index(folder)
    parsed.clear()
    for _ in range(3):
        table = open_shards(folder)
        assert list(table) == expected
        assert table.samples.tolist() == [shard.samples for shard in expected]
        assert table.raw_bytes.tolist() == [shard.raw_data.bytes for shard in expected]
        names = [shard.raw_data.basename for shard in expected]
        assert [table.name(number) for number in range(len(table))] == names
    assert parsed == [folder], "parsed once, read from the cache afterwards"
    with pytest.raises(IndexError):
        table[len(expected)]


def test_a_small_set_gets_no_cache(make_shards: MakeShards) -> None:
    folder = make_shards("red", 40)
    before = sorted(folder.iterdir())
    open_shards(folder)
    assert sorted(folder.iterdir()) == before


@pytest.mark.usefixtures("always_cached")
def test_the_table_of_another_index_is_made_again(
    make_shards: MakeShards, parsed: list[Path]
) -> None:
    red, blue = make_shards("red", 40), make_shards("blue", 90)
    open_shards(red), open_shards(blue)
    (red / SHARDS_CACHE).write_bytes((blue / SHARDS_CACHE).read_bytes())
    parsed.clear()
    assert read_all(StreamStore(stream(red))) == [f"red-{i}" for i in range(40)]
    assert parsed == [red]
    assert list(open_shards(red)) == mds.read_index(red)


@pytest.mark.usefixtures("always_cached")
def test_a_folder_that_can_not_be_written_is_read(
    make_shards: MakeShards, parsed: list[Path]
) -> None:
    folder = make_shards("red", 40)
    (folder / SHARDS_CACHE).mkdir()  # so that nothing can take this name, whoever runs the test
    for _ in range(2):
        assert len(read_all(StreamStore(stream(folder)))) == 40
    assert parsed == [folder, folder]
    assert not list(folder.glob(".index.shards.*"))


def repacked(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change a cached table as somebody who knows the format would: all hashes are right."""
    before = SharedArrays.load(file, 1 << 30)
    arrays = {name: np.array(before[name]) for name in before._arrays}
    meta = dict(before.meta)
    change(meta, arrays)
    SharedArrays.pack(meta, arrays).save(file)


def renamed(name: bytes) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        names = arrays["names"].tobytes().split(b"\n")[:-1]
        names[0] = name
        arrays["name_ends"] = np.cumsum([len(name) + 1 for name in names]).astype(np.uint32)
        arrays["names"] = np.frombuffer(b"".join(name + b"\n" for name in names), np.uint8)

    return change


def assigned(array: str, value: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays[array][0] = value

    return change


def shortened(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
    arrays["samples"] = arrays["samples"][:-1]


def retyped(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
    arrays["samples"] = arrays["samples"].view(np.uint64)


def with_pickles(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
    meta["settings"][0]["column_encodings"] = ["pkl"] * len(meta["settings"][0]["column_encodings"])


def without_images(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
    meta["settings"][0] |= {"column_names": ["id"], "column_encodings": ["str"]}
    meta["settings"][0]["column_sizes"] = [None]


HOSTILE = {
    "a path out of the folder": renamed(b"../../secret.mds"),
    "an absolute path": renamed(b"/etc/passwd"),
    "the index as a shard": renamed(b"index.json"),
    "a hidden name": renamed(b".index.shards"),
    "bytes that are no text": renamed(b"\xff\xfe.mds"),
    "a name twice": renamed(b"shard.00001.mds"),
    "samples below zero": assigned("samples", -1),
    "more samples than bytes": assigned("samples", 1 << 40),
    "a shard of many gigabytes": assigned("raw_bytes", 1 << 40),
    "names that overlap": assigned("name_ends", 3),
    "texts that go backwards": assigned("file_ends", 1 << 31),
    "settings that are not there": assigned("settings", 9),
    "one array shorter": shortened,
    "another type": retyped,
    "columns of pickles": with_pickles,
    "other columns": without_images,
    "no settings": lambda meta, arrays: meta.clear(),
    "settings of another kind": lambda meta, arrays: meta.update(settings=[7]),
}


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_table_is_made_again(
    make_shards: MakeShards,
    parsed: list[Path],
    change: Callable[[dict[str, Any], dict[str, Any]], None],
) -> None:
    folder = make_shards("red", 40)
    open_shards(folder)
    repacked(folder / SHARDS_CACHE, lambda meta, arrays: None)
    parsed.clear()
    open_shards(folder)
    assert not parsed, "a table that is packed again without a change is taken"
    repacked(folder / SHARDS_CACHE, change)
    assert read_all(StreamStore(stream(folder))) == [f"red-{i}" for i in range(40)]
    assert parsed == [folder]


@pytest.mark.usefixtures("always_cached")
def test_hashes_that_can_not_be_checked_are_refused_when_the_shard_is_used(
    make_shards: MakeShards,
) -> None:
    folder = make_shards("red", 40)
    open_shards(folder)

    def change(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        before, _, after = arrays["files"].tobytes().rpartition(b"xxh64")
        arrays["files"] = np.frombuffer(before + b"crc99" + after, np.uint8)

    repacked(folder / SHARDS_CACHE, change)
    table = open_shards(folder)
    assert table[0] == mds.read_index(folder)[0]
    with pytest.raises(ValueError, match=r"\.index\.shards is damaged.*remove it"):
        table[len(table) - 1]


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a bit": lambda content: content[:-70] + bytes([content[-70] ^ 1]) + content[-69:],
    "another column": lambda content: content.replace(b'"jpeg"', b'"str" ').replace(
        b'"bytes"', b'"str"  '
    ),
    "no header": lambda content: b"x" * len(content),
    "a pickle": lambda content: pickle.dumps({"samples": [1]}),
    "a numpy file": lambda content: b"\x93NUMPY" + content,
    "another version": lambda content: content.replace(b'"version": 1', b'"version": 2'),
    "no fields": lambda content: b'{"version": 1}\n' + content,
    "a huge array": lambda content: content.replace(b'"<i8", ', b'"<i8", 9'),
    "objects": lambda content: content.replace(b'"<i8"', b'"|O8"'),
}


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_made_again(
    make_shards: MakeShards, parsed: list[Path], change: Callable[[bytes], bytes]
) -> None:
    folder = make_shards("red", 40)
    open_shards(folder)
    file = folder / SHARDS_CACHE
    file.write_bytes(change(file.read_bytes()))
    assert len(read_all(StreamStore(stream(folder)))) == 40
    assert parsed == [folder, folder]


@pytest.mark.usefixtures("always_cached")
def test_a_link_or_a_pipe_in_its_place_is_not_followed(
    make_shards: MakeShards, tmp_path: Path
) -> None:
    folder = make_shards("red", 40)
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (folder / SHARDS_CACHE).symlink_to(victim)
    open_shards(folder)
    assert victim.read_text() == "untouched"
    assert not (folder / SHARDS_CACHE).is_symlink()
    (folder / SHARDS_CACHE).unlink()
    os.mkfifo(folder / SHARDS_CACHE)
    assert len(open_shards(folder)) > 2


def captioned(folder: Path, counts: list[int]) -> Path:
    records = []
    for i, count in enumerate(counts):
        records.append(Record(f"i{i}", jpeg(i), [f"c{i}-{n}" for n in range(count)], "s"))
    write_shards(folder, records, shard_size="20kb")
    return folder


@pytest.mark.usefixtures("always_cached")
def test_captions_are_found_as_the_index_counts_them(tmp_path: Path) -> None:
    counts = [1] * 20 + [3, 1, 2, 300] * 4 + [1] * 11
    folder = captioned(tmp_path / "set", counts)
    by_shard = read_caption_counts(folder)
    assert None in by_shard and any(by_shard)
    for _ in range(2):  # parsed, then cached
        store = StreamStore(StreamRecipe("set", str(folder), repeat="captions"))
        assert (folder / CAPTIONS_CACHE).is_file()
        assert int(store.shard_items.sum()) == sum(counts)
        for shard, part in enumerate(by_shard):
            part = part or [1] * int(store.shard_samples[shard])
            ends = [0, *accumulate(part)]
            items = [store.locate(shard, item) for item in range(int(store.shard_items[shard]))]
            expected = [(i, n) for i, count in enumerate(part) for n in range(count)]
            assert items == expected and len(items) == ends[-1]


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize(
    "change", [assigned("items", 10**9), assigned("starts", 5), assigned("items", -5)]
)
def test_hostile_captions_are_made_again(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    folder = captioned(tmp_path / "set", [1] * 20 + [2] * 20)
    recipe = StreamRecipe("set", str(folder), repeat="captions")
    StreamStore(recipe)
    repacked(folder / CAPTIONS_CACHE, change)
    assert int(StreamStore(recipe).shard_items.sum()) == 60


def answer(store: StreamStore, results: Any) -> None:
    """In another process: what it reads, and how much memory of its own the table takes there."""
    mapped = store.shards.samples.base is not None and not store.shards.samples.flags.owndata
    results.put((store.read(1, 0)["id"], store.shards.samples.tolist(), mapped))


@pytest.mark.multiprocess
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_another_process_maps_the_same_memory(make_shards: MakeShards, method: str) -> None:
    store = StreamStore(stream(make_shards("red", 40)))
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=answer, args=(store, results))
    process.start()
    name, samples, mapped = results.get(timeout=60)
    process.join()
    assert (name, samples, mapped) == (store.read(1, 0)["id"], store.shard_samples.tolist(), True)


def test_what_is_sent_to_a_worker_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    sizes = []
    for count in (10, 3000):
        folder = tmp_path / str(count)
        write_index(folder, count)
        table = open_shards(folder)
        sizes.append(len(pickle.dumps(table)))
        copy = pickle.loads(pickle.dumps(table))
        assert copy.name(count - 1) == table.name(count - 1)
        assert not copy.samples.flags.writeable
    assert sizes[1] - sizes[0] < 100


def test_arrays_of_a_process_that_ended_are_an_error() -> None:
    sent = pickle.dumps(SharedArrays.pack({}, {"a": np.zeros(3, np.int64)}))  # which close here
    with pytest.raises(RuntimeError, match=r"no longer shares its arrays|other arrays"):
        pickle.loads(sent)


def write_index(folder: Path, count: int) -> None:
    """An index of shards that are not there."""
    folder.mkdir()
    write_shards(folder / "one", [Record("a", jpeg(0), "a", "s")])
    index = json.loads((folder / "one" / "index.json").read_text())
    (entry,) = index["shards"]
    index["shards"] = []
    for number in range(count):
        raw = entry["raw_data"] | {"basename": f"shard.{number:06}.mds"}
        index["shards"].append(entry | {"raw_data": raw})
    (folder / "index.json").write_text(json.dumps(index))


def test_a_missing_shard_is_named_at_the_start(make_shards: MakeShards) -> None:
    folder = make_shards("red", 40)
    victim = sorted(folder.glob("shard.*"))[2]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=f"{victim.name} is missing"):
        StreamStore(stream(folder))


def test_places_are_counted_over_all_shards(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "set", [1] * 40)
    store = StreamStore(stream(folder))
    counts = store.shard_samples.tolist()
    assert len(counts) > 3
    expected = [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    assert store.places(range(40)) == expected
    assert store.places(iter([])) == []
