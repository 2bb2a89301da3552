"""Lists that stay in their files: the same chunks as of lists in memory, in a few bytes an item."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import random
import tracemalloc
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO

import pytest
from data_samples import jpeg

from blip_scale.data.captions import RoleText
from blip_scale.data.conversion import lists, spool
from blip_scale.data.conversion.chunks import read_safely
from blip_scale.data.conversion.lists import ChangedList, StreamedList, group_by_image
from blip_scale.data.conversion.pairs import (
    START,
    Chunk,
    Found,
    Place,
    RawPair,
    Reason,
    Reject,
    Source,
)
from blip_scale.data.conversion.run import Conversion, Part, convert
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.conversion.spool import Spool
from blip_scale.data.sources import annotations, json_lists
from blip_scale.data.sources.blip_json import chunks as json_chunks
from blip_scale.data.sources.folder import chunks as folder_chunks
from blip_scale.data.sources.json_lists import JsonList
from blip_scale.data.sources.readers import READERS
from blip_scale.errors import RefusedInput

CAPTIONS = ('two "dogs", \u00e9\U0001f600', "line\nbreak", "", "\u2028", '["a", "b"]')
BROKEN = {
    "csv": (
        'img3.jpg,"open\n',
        "a,b,c,d\n",
        "\n",
        "x.jpg,\udcff\n",
    ),
    "jsonl": ("{bad\n", "\n", "7\n", '{"caption": "no image"}\n'),
    "tsv": ("a\tb\tc\n", "\n"),
}


def rows(form: str, images: int, count: int = 80) -> Iterator[str]:
    """Rows of a list whose images come several times, beside each other and far apart, and rows
    that are broken."""
    rng = random.Random(f"{form} {images}")
    name = ""
    for _ in range(count):
        name = name if name and rng.random() < 0.3 else f"img{rng.randrange(images)}.jpg"
        caption = rng.choice(CAPTIONS)
        if form == "csv":
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow([name, caption])
            yield line.getvalue()
        elif form == "tsv":
            yield f"{name}\t{caption.replace(chr(10), ' ')}\n"
        else:
            yield json.dumps({"image": name, "caption": caption}, ensure_ascii=False) + "\n"
        if rng.random() < 0.1:
            yield rng.choice(BROKEN[form])


def write_list(path: Path, images: int) -> None:
    """A list of the form that its name ends with; `wide` before the ending is UTF-16."""
    form = path.name.removesuffix(".gz").rpartition(".")[2]
    if form == "json":
        lines = [line for line in rows("jsonl", images) if line.strip() and "bad" not in line]
        text = f"[{','.join(lines)}]\n"
    else:
        header = {"csv": "image,caption\n", "tsv": "image\tcaption\n", "jsonl": ""}[form]
        text = header + "".join(rows(form, images))
    if "wide" in path.name:
        path.write_text(text, encoding="utf-16", errors="surrogatepass")
        return
    content = text.encode("utf-8", errors="surrogateescape")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def chunks_of(path: Path, size: int) -> list[Chunk]:
    read = json_chunks if ".json" in path.suffixes else folder_chunks
    return list(read(Source(str(path), pairs_per_chunk=size)))


def content(chunk: Chunk) -> list[Found]:
    """What another process reads of a chunk."""
    return list(pickle.loads(pickle.dumps(chunk.read))())


@pytest.mark.parametrize("images", [5, 60, 10_000])
@pytest.mark.parametrize(
    "form",
    ["csv", "tsv", "jsonl", "json", "csv.gz", "jsonl.gz", "json.gz", "wide.csv", "wide.json"],
)
def test_chunks_are_those_of_a_list_in_memory(
    form: str, images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_SPACING", 3), ("_AHEAD_BYTES", 100)):
        monkeypatch.setattr(lists, name, value)
    monkeypatch.setattr(spool, "_BATCH", 5)
    monkeypatch.setattr(json_lists, "_BLOCK_BYTES", 64)
    path = tmp_path / f"list.{form}"
    write_list(path, images)
    (whole,) = chunks_of(path, 10_000)
    with monkeypatch.context() as patch:
        patch.setattr(lists, "StreamedList", lambda read, note: read_whole(read))
        expected = content(*chunks_of(path, 10_000))
    assert content(whole) == expected
    assert len(expected) == whole.pairs
    for size in (1, 7):
        parts = chunks_of(path, size)
        items = [content(chunk) for chunk in parts]
        assert list(chain.from_iterable(items)) == expected
        assert [len(part) for part in items] == [chunk.pairs for chunk in parts]
        assert parts[-1].name.endswith(f"to {len(expected) - 1}")


def read_whole(read: lists.ReadList) -> list[Found]:
    return group_by_image(item for _, item in read(START))


def test_a_list_takes_some_bytes_an_image() -> None:
    def peak_bytes(count: int) -> int:
        pairs = ((Place(0, n, n), RawPair(f"{n:09}.jpg", None, "a cat")) for n in range(count))
        tracemalloc.start()
        items = StreamedList(lambda start: iter(pairs))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(items) == count
        return peak

    assert (peak_bytes(30_000) - peak_bytes(10_000)) / 20_000 < 20


def test_the_plan_is_that_of_lists_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversions that were begun by earlier releases go on."""
    monkeypatch.chdir(tmp_path)
    Path("list.jsonl").write_text("".join(rows("jsonl", 60, 30)).replace("\U0001f600", ""))
    chunks = list(folder_chunks(Source("list.jsonl", pairs_per_chunk=15)))
    plan = Conversion(chunks, "out", Rules("test")).plan()
    assert plan["input"] == ["eb461d2f9a1bccd8 0 to 14", "2d90915df5280a7d 15 to 16"]


def test_a_list_that_changes_meanwhile_ends_the_conversion(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("image,caption\na.jpg,a cat\n")
    chunks = chunks_of(path, 1)
    job = Conversion(chunks, str(tmp_path / "out"), Rules("test"))
    path.write_text("image,caption\nb.jpg,a dog\n")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ChangedList, match=r"list\.csv has changed since its conversion began"):
        convert(job, Part())


@pytest.mark.parametrize(
    "text",
    [
        "[1,]", "[1 2]", "[1] x", "[1, 2", '[{"a": 1},\n {"b" 2}]', "[", '["\u00e9", nope]',
        "[\n\n1,\n22,]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_errors_of_arrays_are_those_of_json(
    text: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lists, "_BLOCK_BYTES", block)
    path = tmp_path / "list.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(json.JSONDecodeError) as whole:
        json.loads(text)
    with pytest.raises(ValueError, match=r"list\.json is not JSON: ") as streamed:
        list(JsonList.open(str(path)).read())
    assert str(streamed.value).endswith(f"is not JSON: {whole.value}")


@pytest.mark.parametrize("block", [3, 4, 5, 1 << 20])
def test_arrays_may_be_cut_anywhere(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lists, "_BLOCK_BYTES", block)
    items = [1e-05, -12.5, '\u00e9\U0001f600\\"', {"a": [None, True]}, 123456789012345678, [], ""]
    path = tmp_path / "list.json"
    text = f"\ufeff {json.dumps(items, ensure_ascii=False, indent=1)} \n"
    path.write_text(text, encoding="utf-8")
    read = list(JsonList.open(str(path)).read())
    assert [item for _, _, item in read] == items
    offset, number, _ = read[3]
    assert list(JsonList.open(str(path)).read(offset, number)) == read[3:]


def test_a_spool_holds_the_items_and_has_no_name(tmp_path: Path) -> None:
    items: list[Found] = [
        RawPair("a", b"image", [RoleText("alt", "half \udc80"), None, {"x": [1]}], similarity=0.5),
        Reject("b", Reason.MISSING_KEY, "\u2028", captions=2),
        *(RawPair(f"{n}", f"{n}.jpg", "a cat", annotations=[{"n": n}]) for n in range(200)),
    ]
    spooled = Spool.of(iter(items), str(tmp_path))
    assert not list(tmp_path.iterdir())
    borrowed = pickle.loads(pickle.dumps(spooled))
    placed = list(borrowed(START))
    assert [repr(item) for _, item in placed] == [repr(item) for item in items]
    for number in (0, 63, 64, 150):
        assert list(borrowed(placed[number][0])) == placed[number:]
    del spooled
    # A worker outlives a killed conversion by a moment: its chunk must not look like a damaged one.
    chunk = Chunk("a", lambda: (item for _, item in borrowed(START)), "")
    with pytest.raises(OSError, match="no longer shares its list"):
        list(read_safely(chunk))


def test_a_full_disk_under_a_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_full_disk(dir: str) -> IO[bytes]:
        return Path("/dev/full").open("wb")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", on_full_disk)
    pairs = (RawPair(f"{number}", None, "a cat") for number in range(100))
    with pytest.raises(OSError, match=rf"{tmp_path} is full after 0 items .* with --scratch"):
        Spool.of(pairs, str(tmp_path))


def test_a_packed_list_gives_the_shards_of_the_list(tmp_path: Path) -> None:
    """Also on two machines, each of which unpacks it for itself."""
    for number in range(6):
        (tmp_path / f"img{number}.jpg").write_bytes(jpeg(number, (40, 40)))
    write_list(tmp_path / "list.jsonl", 6)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "list.jsonl").read_bytes()))
    for name, path, parts in (("a", tmp_path / "list.jsonl", 1), ("b", packed, 2)):
        for number in range(parts):
            job = Conversion(chunks_of(path, 2), str(tmp_path / name), Rules("test"), workers=2)
            convert(job, Part(number, parts))
    shards = sorted(path.name for path in (tmp_path / "a").glob("shard.*"))
    assert shards == sorted(path.name for path in (tmp_path / "b").glob("shard.*"))
    assert len(shards) > 2
    for name in (*shards, "index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_list_that_unpacks_to_far_more_than_any_text(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lists, "_UNPACKED_BYTES", 1 << 13)
    path = tmp_path / f"list.{form}.gz"
    bomb = b"{}\n" * (1 << 13) if form == "jsonl" else b"[" + b" " * (1 << 14) + b"]"
    path.write_bytes(gzip.compress(bomb))
    with pytest.raises(RefusedInput, match=rf"list\.{form}\.gz: 0 MB of it unpack to more than 0"):
        chunks_of(path, 10)
    monkeypatch.setattr(json_lists, "_UNPACKED_RATIO", 10_000)
    chunks_of(path, 10)


def test_an_object_that_unpacks_to_more_than_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotations, "_LARGEST_UNPACKED_BYTES", 10_000)
    monkeypatch.setattr(json_lists, "_UNPACKED_BYTES", 10_000)
    path = tmp_path / "captions.json.gz"
    path.write_bytes(gzip.compress(b'{"images": [' + b" " * 20_000))
    for name in ("coco", "blip_json"):
        with pytest.raises(RefusedInput, match=r"captions\.json\.gz.* unpack it yourself if"):
            list(READERS[name].chunks(Source(str(path))))


def test_a_damaged_packed_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"image": "a.jpg", "caption": "a cat"}\n' * 99)[:-20])
    with pytest.raises(OSError, match=r"list\.jsonl\.gz: damaged \.gz file"):
        chunks_of(path, 10)


@pytest.mark.parametrize("name", ["list.jsonl", "list.csv", "list.json"])
def test_a_line_without_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "LARGEST_FILE_BYTES", 1000)
    monkeypatch.setattr(json_lists, "_BLOCK_BYTES", 500)
    start = {"jsonl": "", "csv": "image,caption\n", "json": "["}[name.partition(".")[2]]
    path = tmp_path / name
    path.write_text(start + '{"image": "a.jpg", "caption": "' + "x" * 5000)
    with pytest.raises(ValueError, match=rf"{name}(:\d has more than 0 MB in a line| is not JSON)"):
        chunks_of(path, 10)
