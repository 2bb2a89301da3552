"""The MDS format, compared with MosaicML's own package, and refused indexes."""

from __future__ import annotations

import bz2
import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import jpeg, stream

from blip_scale.data import mds
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import Record, read_caption_counts, write_shards
from blip_scale.storage.free_space import parse_bytes

COLUMNS = {
    "text": "str", "image": "bytes", "facts": "json", "count": "int", "share": "float32",
    "exact": "float64", "half": "float16", "small": "uint8", "low": "int8", "mid": "uint16",
    "deep": "int16", "wide": "uint32", "cold": "int32", "huge": "uint64", "vast": "int64",
    "digits": "str_int", "decimals": "str_float",
}  # fmt: skip


def samples(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [
        {
            "text": "ç 😀" * i, "image": rng.bytes(i % 7 * 50), "facts": {"a": [i, None, "é"]},
            "count": -i, "share": math.nan if i % 3 else i / 3, "exact": i / 3, "half": i / 2,
            "small": i % 256, "low": -1, "mid": 65535, "deep": -300, "wide": 1 << 31,
            "cold": -(1 << 31), "huge": (1 << 64) - 1, "vast": -(1 << 63), "digits": 10**30 + i,
            "decimals": i / 7,
        }
        for i in range(count)
    ]  # fmt: skip


def write_ours(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    with mds.Writer(folder, **({"columns": COLUMNS, "size_limit": "4kb"} | settings)) as writer:
        for row in rows:
            writer.write(row)
    return folder


def write_theirs(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    streaming = pytest.importorskip("streaming")
    settings = {"columns": COLUMNS, "size_limit": "4kb"} | settings
    with streaming.MDSWriter(out=str(folder), **settings) as writer:
        for row in rows:
            writer.write(row)
    return folder


def read_all(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for shard in mds.read_index(folder):
        if shard.zip_data is not None:
            packed = (folder / shard.zip_data.basename).read_bytes()
            shard.decompress(packed, folder / shard.raw_data.basename)
        rows += [shard.read(index) for index in range(shard.samples)]
    return rows


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            if COLUMNS[name] == "float32":
                value = float(np.float32(value))
            same = row[name] == value or (isinstance(value, float) and math.isnan(value))
            assert same and type(row[name]) is type(value), name


@pytest.mark.parametrize("size_limit", ["4kb", 1500, "1mb"])
@pytest.mark.parametrize("hashes", [(), ("sha1", "xxh64")])
def test_the_bytes_are_those_of_mosaicml(
    tmp_path: Path, size_limit: str | int, hashes: tuple[str, ...]
) -> None:
    rows = samples(60)
    ours = write_ours(tmp_path / "ours", rows, size_limit=size_limit, hashes=hashes)
    reference = write_theirs(tmp_path / "theirs", rows, size_limit=size_limit, hashes=list(hashes))
    names = sorted(path.name for path in reference.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names and len(names) > 1
    for name in names:
        assert (ours / name).read_bytes() == (reference / name).read_bytes(), name
    assert_same(read_all(ours), rows)


@pytest.mark.parametrize("compression", ["zstd", "zstd:7", "gz", "gz:1", "bz2:2", "br:5", "snappy"])
def test_each_reads_what_the_other_compressed(tmp_path: Path, compression: str) -> None:
    rows = samples(40)
    settings = {"compression": compression}
    reference = write_theirs(tmp_path / "theirs", rows, hashes=["xxh64"], **settings)
    assert_same(read_all(reference), rows)
    ours = write_ours(tmp_path / "ours", rows, hashes=("xxh64",), **settings)
    streaming = pytest.importorskip("streaming")
    dataset = streaming.StreamingDataset(local=str(ours), batch_size=1, shuffle=False)
    assert_same([dataset[i] for i in range(len(dataset))] and read_all(ours), rows)
    assert [dataset[i]["text"] for i in range(len(dataset))] == [row["text"] for row in rows]
    raw = [sorted(folder.glob("*.mds")) for folder in (ours, reference)]
    for left, right in zip(*raw, strict=True):
        assert left.read_bytes() == right.read_bytes()


def test_a_set_of_ours_opens_in_their_reader(tmp_path: Path) -> None:
    reader = pytest.importorskip("streaming.base.format.mds").MDSReader
    records = [Record(f"{i}", jpeg(i), ["a", "b"], "test", similarity=0.5) for i in range(9)]
    write_shards(tmp_path / "set", records, shard_size="6kb")
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    store, seen = StreamStore(stream(tmp_path / "set")), 0
    assert index["captions"] == [[2] * shard["samples"] for shard in index["shards"]]
    for number, entry in enumerate(index["shards"]):
        reference = reader.from_json(str(tmp_path / "set"), None, entry)
        for place in range(reference.samples):
            assert dict(reference[place]) == store.read(number, place)
            seen += 1
    assert seen == 9


@pytest.mark.parametrize("encoding", ["pkl", "ndarray", "pil", "list[jpeg]", "jpeg_array", "exe"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    columns = {"a": "str", "b": "bytes"}
    folder = write_ours(tmp_path / "set", [{"a": "x", "b": b"y"}], columns=columns)
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"bytes"]', f'"{encoding}"]'))
    with pytest.raises(ValueError, match="column 'b' has the encoding") as caught:
        mds.read_index(folder)
    assert str(path) in str(caught.value) and repr(encoding) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_of_theirs_is_never_opened(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    write_theirs(tmp_path / "set", [{"a": Harm()}], columns={"a": "pkl"})
    with pytest.raises(ValueError, match="column 'a' has the encoding 'pkl'"):
        mds.read_index(tmp_path / "set")
    assert not (tmp_path / "harm").exists()


def test_images_stay_encoded_files(tmp_path: Path) -> None:
    rows = [{"caption": "a", "image": jpeg(1)}]
    columns = {"caption": "str", "image": "jpeg"}
    assert read_all(write_theirs(tmp_path / "set", rows, columns=columns)) == rows


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../shard.mds", "a/../../b", "a//b", "./a", "a/.", "..", "a\\b", "a\0b",
     ".locks/1", "index.json", "a\nb", "\ud800"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["raw_data", "zip_data"])
def test_names_that_lead_out_of_the_folder_are_refused(
    tmp_path: Path, name: str, form: str
) -> None:
    folder = write_ours(tmp_path / "set", samples(3), compression="gz")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0][form]["basename"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json is not an MDS index \(the file name"):
        mds.read_index(folder)


def test_shards_may_lie_in_folders_below(tmp_path: Path) -> None:
    """MosaicML's merge_index keeps shards in subfolders; they are also fetched into subfolders."""
    records = [Record(f"{i}", jpeg(i), "a", "test") for i in range(12)]
    write_shards(tmp_path / "set", records, shard_size="6kb")
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    for number, entry in enumerate(index["shards"]):
        old = tmp_path / "set" / entry["raw_data"]["basename"]
        entry["raw_data"]["basename"] = f"{number:02}/shard.00000.mds"
        old.parent.joinpath(f"{number:02}").mkdir()
        old.rename(tmp_path / "set" / entry["raw_data"]["basename"])
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    stores = [
        StreamStore(stream(tmp_path / "set")),
        StreamStore(stream(tmp_path / "cache", remote=tmp_path / "set")),
    ]
    for store in stores:
        ids = [store.read(s, i)["id"] for s, n in enumerate(store.shard_samples) for i in range(n)]
        assert ids == [record.id for record in records]
    (tmp_path / "set" / "01" / "shard.00000.mds").unlink()
    with pytest.raises(FileNotFoundError, match=r"01/shard.00000.mds is missing"):
        StreamStore(stream(tmp_path / "set"))


def broken_indexes() -> dict[str, Any]:
    """Fault -> changes to the first entry of an index."""
    return {
        "no object": lambda shard: 7,
        "no name": lambda shard: shard["raw_data"].pop("basename"),
        "no samples": lambda shard: shard.pop("samples"),
        "negative samples": lambda shard: shard.update(samples=-1),
        "true samples": lambda shard: shard.update(samples=True),
        "too many samples": lambda shard: shard.update(samples=10**12),
        "no room for values": lambda shard: shard.update(
            samples=10**9, raw_data=shard["raw_data"] | {"bytes": (1 << 32) - 1}
        ),
        "no number": lambda shard: shard["raw_data"].update(bytes="9"),
        "negative size": lambda shard: shard["raw_data"].update(bytes=-5),
        "huge size": lambda shard: shard["raw_data"].update(bytes=1 << 40),
        "null": lambda shard: shard.update(raw_data=None),
        "list": lambda shard: shard.update(zip_data=[]),
        "column twice": lambda shard: shard.update(column_names=["text"] * len(COLUMNS)),
        "fewer columns": lambda shard: shard["column_names"].pop(),
        "fewer sizes": lambda shard: shard["column_sizes"].pop(),
        "wrong sizes": lambda shard: shard.update(column_sizes=[1] * len(COLUMNS)),
        "numbers": lambda shard: shard.update(column_names=[1] * len(COLUMNS)),
        "version": lambda shard: shard.update(version=3),
        "format": lambda shard: shard.update(format="xsv"),
        "compression": lambda shard: shard.update(compression="lzma"),
        "half compressed": lambda shard: shard.update(compression=None),
        "hashes": lambda shard: shard["raw_data"].update(hashes={"shake_128": "00"}),
        "hash of nothing": lambda shard: shard["raw_data"].update(hashes={"md5": None}),
        "hash by name": lambda shard: shard["raw_data"].update(hashes={"__class__": "0"}),
    }


@pytest.mark.parametrize("problem", broken_indexes())
def test_a_damaged_index_is_one_line(tmp_path: Path, problem: str) -> None:
    folder = write_ours(tmp_path / "set", samples(3), compression="zstd")
    index = json.loads((folder / "index.json").read_text())
    if broken_indexes()[problem](index["shards"][0]) == 7:
        index["shards"][0] = 7
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json is not an MDS index \(") as caught:
        mds.read_index(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"shards": 3}', '{"shards": {}}', "[" * 100_000, "\xff"]
)
def test_what_is_no_index_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json is not an MDS index"):
        mds.read_index(tmp_path)


def test_more_samples_than_the_file_holds_are_refused_at_the_start(tmp_path: Path) -> None:
    """The order takes memory for each. Figures that fit each other are compared with the file."""
    write_shards(tmp_path / "set", [Record("a", b"", "a dog", "s", 1, 1)])
    path = tmp_path / "set" / "index.json"
    index = json.loads(path.read_text())
    entry = index["shards"][0]
    size = entry["raw_data"]["bytes"]
    entry["raw_data"]["bytes"], entry["samples"] = (1 << 32) - 1, 90_000_000
    index["captions"] = [None]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"00000.mds is damaged: {size} bytes.* 90000000 samples"):
        StreamStore(stream(tmp_path / "set"))
    entry["samples"] = 1_000_000_000
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"00000.mds can't hold 1000000000 samples .* 4294967295"):
        StreamStore(stream(tmp_path / "set"))


def test_the_same_shard_twice_is_refused(tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "set", samples(3))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"shards": index["shards"] * 2}))
    with pytest.raises(ValueError, match="two shards have the same name"):
        mds.read_index(folder)


@pytest.mark.parametrize("captions", [3, [3], [[1]], [["1"]], [[0, 1, 1]], [{"a": 1}]])
def test_caption_counts_that_do_not_fit_are_refused(tmp_path: Path, captions: Any) -> None:
    write_shards(tmp_path / "set", [Record(f"{i}", jpeg(i), "a", "test") for i in range(3)])
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    (tmp_path / "set" / "index.json").write_text(json.dumps(index | {"captions": captions}))
    with pytest.raises(ValueError, match=r"index\.json.*captions"):
        read_caption_counts(tmp_path / "set")


def test_offsets_beyond_the_file_are_an_error_of_their_sample(tmp_path: Path) -> None:
    rows = samples(3)
    folder = write_ours(tmp_path / "set", rows)
    path = folder / "shard.00000.mds"
    whole = path.read_bytes()
    for begin, end in ((0, 50), (60, 50), (len(whole), len(whole) + 9), (2**32 - 8, 2**32 - 1)):
        head = np.array([3, begin, end], np.uint32).tobytes()
        path.write_bytes(head + whole[12:])
        with pytest.raises(ValueError, match=r"sample 0 lies outside shard.00000.mds"):
            mds.read_index(folder)[0].read(0)
    assert mds.read_index(folder)[0].read(2)["digits"] == rows[2]["digits"]
    path.write_bytes(whole[:10])
    with pytest.raises(ValueError, match="sample 1 lies outside"):
        mds.read_index(folder)[0].read(1)
    with pytest.raises(IndexError):
        mds.read_index(folder)[0].read(3)


def test_sizes_beyond_the_sample_are_an_error(tmp_path: Path) -> None:
    shard = mds.read_index(write_ours(tmp_path / "set", [{"a": "text"}], columns={"a": "str"}))[0]
    for data in (b"", b"\1", np.array([5], np.uint32).tobytes() + b"text"):
        with pytest.raises(ValueError, match="sample"):
            shard.columns.decode(data)
    with pytest.raises(ValueError, match="column 'a' is damaged"):
        shard.columns.decode(np.array([1], np.uint32).tobytes() + b"\xff")


BOMB_BYTES = 300 << 20


@pytest.mark.parametrize("compression", ["gz", "bz2"])
def test_a_compression_bomb_is_not_inflated(tmp_path: Path, compression: str) -> None:
    folder = write_ours(tmp_path / "set", samples(3), compression=compression)
    pack = {"gz": gzip.compress, "bz2": bz2.compress}[compression]
    shard, target = mds.read_index(folder)[0], tmp_path / "raw"
    with pytest.raises(
        ValueError, match=r"shard.00000.mds decompresses to \d+ bytes, the index says"
    ):
        shard.decompress(pack(bytes(BOMB_BYTES)), target)
    assert target.stat().st_size < shard.raw_data.bytes + (2 << 20)


@pytest.mark.parametrize("compression", ["gz", "bz2", "br", "zstd", "snappy"])
def test_damaged_compression_is_an_error(tmp_path: Path, compression: str) -> None:
    folder = write_ours(tmp_path / "set", samples(30), compression=compression, size_limit="1mb")
    shard = mds.read_index(folder)[0]
    assert shard.zip_data is not None
    data = (folder / shard.zip_data.basename).read_bytes()
    for other in (b"", data[: len(data) // 2], b"\xff\xff\xff\xff\x0f" + data):
        with pytest.raises(ValueError, match=r"shard.00000.mds"):
            shard.decompress(other, tmp_path / "raw")


def test_a_bomb_in_a_remote_set_is_passed_over(tmp_path: Path) -> None:
    """Other samples replace those of the bomb, whose checksum may be right."""
    records = [Record(f"{i}", jpeg(i), "a", "test") for i in range(12)]
    write_shards(tmp_path / "set", records, shard_size="6kb", compression="gz")
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    bomb, packed = gzip.compress(bytes(BOMB_BYTES)), index["shards"][0]["zip_data"]
    (tmp_path / "set" / packed["basename"]).write_bytes(bomb)
    packed.update(bytes=len(bomb), hashes={})
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    store = StreamStore(stream(tmp_path / "cache", remote=tmp_path / "set"))
    with pytest.raises(ValueError, match=r"shard.00000.mds decompresses to .* the index says"):
        store.read(0, 0)
    assert store.read(1, 0)["source"] == "test"
    with pytest.raises(ValueError, match=r"shard.00000.mds decompresses to .* the index says"):
        StreamStore(stream(tmp_path / "set")).read(0, 0)


def test_hashes_of_other_kinds_are_checked(tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "set", samples(3), hashes=("blake2b", "md5", "xxh3_64"))
    info, data = mds.read_index(folder)[0].raw_data, (folder / "shard.00000.mds").read_bytes()
    assert info.difference(data) == ""
    assert "wrong checksum" in info.difference(data[:-1] + bytes([data[-1] ^ 1]))
    assert "the index says" in info.difference(data[:-1])


@pytest.mark.parametrize(
    ("column", "value"), [("str", 3), ("bytes", 5), ("bytes", "a"), ("uint8", 256), ("int", "a"),
                          ("json", {1, 2}), ("str", "\ud800"), ("float32", None)],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_named(tmp_path: Path, column: str, value: object) -> None:
    writer = mds.Writer(tmp_path / "set", {"it": column}, "4kb")
    with pytest.raises(ValueError, match="column 'it' can't hold the value"):
        writer.write({"it": value})


def test_an_error_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(OSError), mds.Writer(tmp_path / "set", {"a": "str"}, "4kb") as writer:
        writer.write({"a": "x"})
        raise OSError
    assert not (tmp_path / "set" / "index.json").exists()
    for size in ("0", "4gb", -1):
        with pytest.raises(ValueError, match="shard size"):
            mds.Writer(tmp_path / "other", {"a": "str"}, size)


def test_an_oversized_sample_has_a_shard_of_its_own(tmp_path: Path) -> None:
    rows = [{"a": "x" * size} for size in (5000, 10, 20, 6000, 30)]
    folder = write_ours(tmp_path / "set", rows, columns={"a": "str"}, size_limit="2kb")
    assert [shard.samples for shard in mds.read_index(folder)] == [1, 2, 1, 1]
    assert read_all(folder) == rows


@pytest.mark.parametrize(
    "text", ["64mb", "4kb", "1.5GB", " 10 kb ", "7b", "123", "0.1tb", "1e3kb", "2pb", "5eb"]
)
def test_sizes_mean_what_they_mean_to_mosaicml(text: str) -> None:
    reference = pytest.importorskip("streaming.base.util")
    assert parse_bytes(text) == reference.bytes_to_int(text)


@pytest.mark.parametrize("text", ["", "mb", "4 apples", "-1kb", "infkb", "nanmb", "1.5", "1.5b"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("module", ["streaming", "fsspec", "boto3"])
def test_the_package_is_not_needed(module: str, repo: Path) -> None:
    for path in (repo / "blip_scale").rglob("*.py"):
        text = path.read_text()
        assert f"import {module}" not in text and f"from {module}" not in text, path
