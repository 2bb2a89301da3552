"""Lists that stay in their files: the same chunks as of lists in memory, in a few bytes an item."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import random
import tracemalloc
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from blip_scale.data.conversion import lists
from blip_scale.data.conversion.lists import (
    ChangedList,
    Place,
    StreamedList,
    group_by_image,
    listed,
)
from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Source
from blip_scale.data.conversion.run import Conversion, Part, convert
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.sources import json_lists
from blip_scale.data.sources.blip_json import chunks as json_chunks
from blip_scale.data.sources.folder import chunks as folder_chunks
from blip_scale.data.sources.json_lists import JsonList

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
    """A list of the form that its name ends with."""
    form = path.suffix[1:]
    if form == "json":
        lines = [line for line in rows("jsonl", images) if line.strip() and "bad" not in line]
        text = f"[{','.join(lines)}]\n"
    else:
        header = {"csv": "image,caption\n", "tsv": "image\tcaption\n", "jsonl": ""}[form]
        text = header + "".join(rows(form, images))
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def chunks_of(path: Path, size: int) -> list[Chunk]:
    read = json_chunks if path.suffix == ".json" else folder_chunks
    return list(read(Source(str(path), pairs_per_chunk=size)))


def content(chunk: Chunk) -> list[Found]:
    """What another process reads of a chunk."""
    return list(pickle.loads(pickle.dumps(chunk.read))())


@pytest.mark.parametrize("images", [5, 60, 10_000])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json"])
def test_chunks_are_those_of_a_list_in_memory(
    form: str, images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_SPACING", 3), ("_AHEAD_BYTES", 100)):
        monkeypatch.setattr(lists, name, value)
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
    return group_by_image(item for _, item in read(lists.START))


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


def test_lists_that_cannot_be_entered_are_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("image,caption\na.jpg,caf\u00e9\n", encoding="utf-16")
    (chunk,) = chunks_of(path, 10)
    (pair,) = content(chunk)
    assert pair.captions == ["caf\u00e9"]  # type: ignore[union-attr]
    assert isinstance(listed(lambda start: iter([]), is_streamed=False), list)
    assert isinstance(listed(lambda start: iter([]), is_streamed=True), StreamedList)
