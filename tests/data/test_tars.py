"""Streams of webdataset tars: what they hold, against the MDS shards converted from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import MakeLoader, jpeg, take
from odd_files import img2dataset_samples, members, turned, write_tar

from blip_scale.commands import index_tars, prepare_data
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.conversion.tar_index import IndexJob, list_tars, write_index
from blip_scale.data.loading.micro_batches import Batch
from blip_scale.data.reading import tar_store
from blip_scale.data.reading.cache import TAR_INDEX, ShardCache
from blip_scale.data.reading.inventory import inventory
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.data.reading.streams import open_stream
from blip_scale.planning import data_volume
from blip_scale.storage import objects

LEFT_OUT = {"missing caption": 1, "missing image": 1, "undecodable": 1}
LONG = " ".join(f"word{number}" for number in range(20)) + ". " + "more " * 20


def write_tars(folder: Path) -> Path:
    """Write four tars of 25 pairs, one of them turned with a long caption, and three rejects."""
    for shard in range(3):
        samples = img2dataset_samples(shard, 8)
        files = members(*((key, parts) for key, parts, _ in samples))
        write_tar(folder / f"{shard:05}.tar", files)
    odd = {
        "a": {"jpg": turned(6), "txt": LONG.encode()}, "b": {"jpg": jpeg(3, (80, 60))},
        "c": {"txt": b"no image"}, "d": {"jpg": b"no image", "txt": b"a dog"},
    }  # fmt: skip
    write_tar(folder / "sub" / "odd.tar", members(*odd.items()))
    return folder


def write_without_processes(job: IndexJob, **options: Any) -> Any:
    """`write_index` for a store that is opened, as quick as a test wants it."""
    return write_index(job, **(options | {"start_method": "fork"}))


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tar_store, "write_index", write_without_processes)
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.0)
    return write_tars(tmp_path / "tars")


@pytest.fixture
def shards(tars: Path, tmp_path: Path) -> Path:
    """MDS shards converted from the tars."""
    out = tmp_path / "shards"
    options = ["--workers", "1", "--tokenizer", "/nowhere", "--label", "set"]
    assert prepare_data.main(["webdataset", str(tars), str(out), *options]) == 0
    return out


def of_tars(local: Path, remote: Path | None = None, **settings: Any) -> StreamRecipe:
    return StreamRecipe("set", str(local), str(remote) if remote else None, "tars", **settings)


def all_samples(store: StreamStore) -> list[dict[str, Any]]:
    counts = store.shard_samples.tolist()
    return [store.read(shard, i) for shard, count in enumerate(counts) for i in range(count)]


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert [batch.ids for batch in batches] == [batch.ids for batch in expected]
    for batch, other in zip(batches, expected, strict=True):
        assert batch.captions == other.captions and batch.sources == other.sources
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.token_ids, other.token_ids)


def test_tars_give_what_converted_shards_give(
    tars: Path, shards: Path, make_loader: MakeLoader, tmp_path: Path
) -> None:
    """The same samples in the same order; alone, on two ranks, resumed, and out of a cache."""
    converted = StreamRecipe("set", str(shards))
    store = open_stream(of_tars(tars))
    expected = all_samples(StreamStore(converted))
    for sample, other in zip(all_samples(store), expected, strict=True):
        assert str(sample) == str(other), sample["id"]
    assert len(expected) == 25 and store.shard_items.tolist() == [8, 8, 8, 1]
    assert expected[-1]["captions"] == [" ".join(f"word{number}" for number in range(20))]
    summary = json.loads((tars / TAR_INDEX / "summary.json").read_text())
    assert summary["rejects"] == LEFT_OUT and summary["pairs"]["written"] == 25
    batches = take(make_loader([converted]), 10)
    assert_equal(take(make_loader([of_tars(tars)]), 10), batches)
    in_cache = of_tars(tmp_path / "cache", tars)
    assert_equal(take(make_loader([in_cache], cache_limit="100kb", workers=1), 10), batches)
    assert len(list((tmp_path / "cache").rglob("*.tar"))) < 4, "some are evicted"
    ranks = [take(make_loader([of_tars(tars)], rank, 2), 10) for rank in range(2)]
    for number, batch in enumerate(batches):
        assert ranks[0][number].ids + ranks[1][number].ids == batch.ids
    first = make_loader([of_tars(tars)])
    take(first, 4)
    resumed = make_loader([in_cache])
    resumed.load_state_dict(first.state_dict())
    assert_equal(take(resumed, 6), batches[4:])


def test_each_caption_once(tars: Path) -> None:
    texts = json.dumps({"caption": ["one", "two"]}).encode()
    write_tar(tars / "several.tar", members(("a", {"jpg": jpeg(1, (80, 60)), "json": texts})))
    store = open_stream(of_tars(tars, repeat="captions"))
    assert store.shard_items.tolist() == [8, 8, 8, 2, 1], "in the order of the names"
    assert store.locate(3, 1) == (0, 1)


def test_changed_tars_are_indexed_anew(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = of_tars(tars)
    opened = open_stream(stream)
    stamp = (tars / TAR_INDEX / "set.json").read_text()
    (listed,) = inventory([opened])
    assert (listed["samples"], listed["shards"]) == (25, 4)
    assert listed["bytes"] == sum(tar.size for tar in list_tars(str(tars)))
    assert data_volume._count(tars, by_caption=True) == (25, 25, listed["bytes"])

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the index is made again")

    with monkeypatch.context() as patch:
        patch.setattr(tar_store, "write_index", never)
        open_stream(stream)
    samples = img2dataset_samples(7, 5)
    write_tar(tars / "00001.tar", members(*((key, parts) for key, parts, _ in samples)))
    with monkeypatch.context() as patch:
        patch.setattr(tar_store, "_LARGEST_UNINDEXED", 1000)
        with pytest.raises(
            FileNotFoundError, match=r"4 tars .* no current index; run `blip-scale index"
        ):
            open_stream(stream)
    with pytest.raises(ValueError, match=r"00001\.tar is damaged: \d+ bytes, not \d+"):
        all_samples(opened)
    store = open_stream(stream)
    assert (tars / TAR_INDEX / "set.json").read_text() != stamp
    assert store.shard_samples.tolist() == [8, 5, 8, 1]
    assert [s["id"] for s in all_samples(store)][8:13] == [f"00001/{key}" for key, _, _ in samples]


def test_a_truncated_tar(tars: Path, tmp_path: Path, make_loader: MakeLoader) -> None:
    """What is before the damage is indexed; a tar that is cut later is skipped and counted."""
    remote = of_tars(tmp_path / "cache", tars)
    assert open_stream(of_tars(tars)).samples == 25
    loader = make_loader([remote])
    path = tars / "00001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    skipped = [line for batch in take(loader, 12) for line in batch.skipped]
    assert skipped and all("set/00001.tar: " in line for line in skipped)
    store = open_stream(of_tars(tars))
    assert 0 < store.shard_samples[1] < 8
    assert json.loads((tars / TAR_INDEX / "summary.json").read_text())["rejects"] == (
        LEFT_OUT | {"damaged input": 2}
    )


def test_an_index_that_lies(tars: Path) -> None:
    """Places outside a tar, or where no file of that size is, are corrupt samples."""
    store = open_stream(of_tars(tars))
    place = store._texts.read(0, 2)["image_place"]
    for offset, size in ((-512, 10), (0, 10), (1 << 40, 10), (place[0], 1 << 40), (place[0], 9)):
        with pytest.raises(ValueError, match=r"no file of \d+ bytes"):
            store._image(0, offset, size, False)
    content = bytearray((tars / "00000.tar").read_bytes())
    content[place[0] - 512 + 130] ^= 1  # the size in the header
    (tars / "00000.tar").write_bytes(content)
    with pytest.raises(CorruptSample, match="the tar has changed"):
        store.read(0, 2)
    assert store.read(0, 3)["id"] == "00000/000000003"


def test_what_is_no_folder_of_tars(tmp_path: Path, tars: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"stream 'set': .*empty: there is no \.tar"):
        open_stream(of_tars(tmp_path / "empty"))
    write_tar(tars / "packed.tar.gz", members(("a", {"jpg": b"", "txt": b"a"})), "w:gz")
    with pytest.raises(ValueError, match=r"packed\.tar\.gz is compressed: unpack it, or convert"):
        open_stream(of_tars(tars))
    (tars / "packed.tar.gz").unlink()
    write_tar(tmp_path / "bad" / "a.tar", members(("a", {"jpg": b"no image", "txt": b"a"})))
    with pytest.raises(ValueError, match=r"the tars hold no pairs .*undecodable': 1"):
        open_stream(of_tars(tmp_path / "bad"))
    (tars / "gz.tar").write_bytes(b"")
    assert open_stream(of_tars(tars)).samples == 25
    stamp = tars / TAR_INDEX / "set.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"format": 9}))
    with pytest.raises(ValueError, match="by another release: remove it"):
        open_stream(of_tars(tars))


def test_the_command(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts, filters, and an index in the cache for tars that are elsewhere."""
    for part in range(2):
        options = ["--workers", "1", "--shard", f"{part}/2"]
        assert index_tars.main([str(tars), *options]) == 0
    output = capsys.readouterr().out
    assert "part 0/2 is done; other parts are not done yet" in output
    assert "pairs: 28 read = 25 indexed + 3 left out\n  missing caption: 1\n" in output
    out = tmp_path / "cache" / TAR_INDEX
    limits = ["--min-similarity", "0.3", "--workers", "1"]
    other = write_tars(tmp_path / "other")
    assert index_tars.main([str(other), str(out), *limits]) == 0
    assert "missing score: 4" in capsys.readouterr().out
    monkeypatch.setattr(tar_store, "write_index", None)
    store = open_stream(of_tars(tmp_path / "cache", other))
    assert store.samples == 24 and len(all_samples(store)) == 24
    (tmp_path / "home").mkdir()
    backup = tmp_path / "home" / "backup.tar"
    backup.touch()
    ShardCache([tmp_path / "cache", backup.parent], 1)._drop_until(1)
    assert backup.is_file(), "a cache of shards has no tars to evict"
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert list(out.glob("shard.*.mds")), "an index is never evicted"
    assert len(all_samples(store)) == 24, "fetched again"
    assert index_tars.main([str(other), "--max-punsafe", "2"]) == 2
    assert index_tars.main([str(other), str(out), "--shard", "0/2"]) == 2
    assert "is an index of other tars, or with other options" in capsys.readouterr().err
