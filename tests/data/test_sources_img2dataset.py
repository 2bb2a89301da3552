"""Tars, parquet files and folders as written by img2dataset, whole and damaged."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from odd_files import (
    EMOJI_CAPTION,
    HTML,
    img2dataset_meta,
    img2dataset_samples,
    members,
    pairs,
    read_all,
    rejects,
    write_img2dataset_parquet,
    write_img2dataset_tars,
    write_tar,
)

from blip_scale.data.captions import RoleText
from blip_scale.data.conversion.pairs import Found, RawPair, Reject, Source, Unused
from blip_scale.data.sources.readers import READERS


def contents(items: list[Found]) -> list[tuple[str, object, object]]:
    """Id, image and captions of all pairs."""
    return [(item.id, item.image, item.captions) for item in items if isinstance(item, RawPair)]


def write_parquet_form(folder: Path, shards: int, count: int) -> None:
    for shard in range(shards):
        write_img2dataset_parquet(folder / f"{shard:05}.parquet", img2dataset_samples(shard, count))


def write_files_form(folder: Path, shards: int, count: int) -> None:
    for shard in range(shards):
        samples = img2dataset_samples(shard, count)
        (folder / f"{shard:05}").mkdir(parents=True)
        for key, files, _ in samples:
            for ending, data in files.items():
                (folder / f"{shard:05}" / f"{key}.{ending}").write_bytes(data)
        write_img2dataset_parquet(folder / f"{shard:05}.parquet", samples, images=False)


@pytest.mark.parametrize("name", ["laion", "sbu", "conceptual_captions"])
@pytest.mark.parametrize("write", [write_img2dataset_tars, write_parquet_form, write_files_form])
def test_the_three_forms_hold_the_same(
    write: Callable[[Path, int, int], None], name: str, tmp_path: Path
) -> None:
    write(tmp_path / "in", 2, 6)
    chunks = list(READERS[name].chunks(Source(str(tmp_path / "in"))))
    assert [chunk.name.split(".")[0] for chunk in chunks] == ["00000", "00001"]
    items = pairs(read_all(chunks))
    expected = [sample for shard in range(2) for sample in img2dataset_samples(shard, 6)]
    assert list(items) == [key for key, _, _ in expected]
    for key, files, _ in expected:
        pair = items[key]
        assert pair.image == files["jpg"]
        assert pair.captions == f"Picture {key}, {EMOJI_CAPTION}"
        assert (pair.url, pair.similarity) == (f"https://host.example/{key}.jpg", 0.3125)


def test_one_file_and_urls(tmp_path: Path) -> None:
    write_img2dataset_tars(tmp_path, 2, 3)
    write_parquet_form(tmp_path / "parquet", 1, 3)
    for place in (
        f"{tmp_path}/00001.tar", f"file://{tmp_path}/00001.tar",
        f"{tmp_path}/parquet/00000.parquet", f"file://{tmp_path}/parquet",
    ):  # fmt: skip
        assert len(pairs(read_all(list(READERS["laion"].chunks(Source(place)))))) == 3


def test_images_that_img2dataset_did_not_get(tmp_path: Path) -> None:
    samples = img2dataset_samples(0, 3)
    failed = img2dataset_meta(
        "000000009", "gone", status="failed_to_download", error_message="HTTP Error 404", width=None
    )
    write_img2dataset_parquet(tmp_path / "00000.parquet", [*samples, ("000000009", {}, failed)])
    items = read_all(list(READERS["laion"].chunks(Source(str(tmp_path)))))
    assert len(pairs(items)) == 3
    assert rejects(items) == [("000000009", "missing image")]


def test_a_list_of_urls_is_not_the_set(tmp_path: Path) -> None:
    rows = [{"URL": "https://host.example/1.jpg", "TEXT": "a dog", "similarity": 0.3}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "part-0.parquet")
    (chunk,) = READERS["laion"].chunks(Source(str(tmp_path)))
    (reject,) = chunk.read()
    assert isinstance(reject, Reject) and reject.id == "part-0.parquet"
    assert re.match(r"has no column with images.*img2dataset.* columns: URL, TEXT", reject.detail)
    (tmp_path / "cc3m.tsv").write_text("a dog\thttps://host.example/1.jpg\n")
    with pytest.raises(ValueError, match=r"cc3m\.tsv is a list of URLs: .* img2dataset first"):
        READERS["conceptual_captions"].chunks(Source(str(tmp_path / "cc3m.tsv")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no output of img2dataset"):
        READERS["laion"].chunks(Source(str(tmp_path / "empty")))
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        READERS["laion"].chunks(Source(str(tmp_path / "nowhere")))


def read_tar(path: Path, caption_key: str = "") -> list:
    return read_all(list(READERS["webdataset"].chunks(Source(str(path), caption_key=caption_key))))


def test_samples_of_any_webdataset(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        members(
            ("dir.v1/plain", {"PNG": b"image 1", "txt": b"\xef\xbb\xbfone"}),
            ("./dotted", {"cls": b"7", "jpeg": b"image 2", "json": b'{"text": ["two", "zwei"]}'}),
            ("no_text", {"jpg": b"image 3", "json": b'{"url": "u", "similarity": "0.5"}'}),
            ("no_image", {"txt": b"four", "json": b"[1]"}),
            ("bad_text", {"jpg": b"image 5", "txt": b"\xff\xfe", "json": b'{"similarity": NaN}'}),
            ("html", {"jpg": HTML, "txt": b"six", "json": HTML}),
            ("twice", {"jpg": b"image 7", "txt": b"seven"}),
            ("twice", {"jpg": b"image 8", "txt": b"eight"}),
            ("._twice", {"jpg": b"resource fork"}),
            ("README", {"md": b"no sample"}),
        ),
    )
    items = read_tar(path)
    samples = [item for item in items if isinstance(item, RawPair)]
    assert [item for item in items if not isinstance(item, RawPair)] == [
        Unused("files .cls"), Unused("files .md"), Unused("hidden and special files"),
    ]  # fmt: skip
    assert [(item.id.removeprefix("a/"), item.image, item.captions) for item in samples] == [
        ("dir.v1/plain", b"image 1", "one"),
        ("dotted", b"image 2", ["two", "zwei"]),
        ("no_text", b"image 3", None),
        ("no_image", None, "four"),
        ("bad_text", b"image 5", b"\xff\xfe"),
        ("html", HTML, "six"),
        ("twice", b"image 7", "seven"),
        ("twice", b"image 8", "eight"),
    ]
    assert (items[2].url, items[2].similarity, items[4].similarity) == ("u", 0.5, None)


def test_the_caption_may_lie_elsewhere(tmp_path: Path) -> None:
    meta = json.dumps({"caption": "alt text", "synthetic": "a brown dog"}).encode()
    path = write_tar(
        tmp_path / "a.tar", members(("a", {"jpg": b"image", "txt": b"raw", "json": meta}))
    )
    assert read_tar(path)[0].captions == "raw"
    assert read_tar(path, "synthetic")[0].captions == [RoleText("synthetic", "a brown dog")]
    assert read_tar(path, "nothing")[0].captions is None


def test_compressed_tars_and_folders_of_them(tmp_path: Path) -> None:
    samples = img2dataset_samples(0, 3)
    files = members(*((key, parts) for key, parts, _ in samples))
    write_tar(tmp_path / "a" / "one.tar.gz", files, "w:gz")
    write_tar(tmp_path / "b" / "two.tgz", files, "w:gz")
    chunks = list(READERS["webdataset"].chunks(Source(str(tmp_path))))
    assert [chunk.name for chunk in chunks] == ["a/one.tar.gz", "b/two.tgz"]
    assert len(read_all(chunks)) == 6


def cut_after(part: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * part)]


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz"])
@pytest.mark.parametrize("damage", [cut_after(0.5), cut_after(0.503), cut_after(0.507)])
def test_a_truncated_tar(damage: Callable[[bytes], bytes], name: str, tmp_path: Path) -> None:
    samples = img2dataset_samples(0, 20)
    path = write_tar(tmp_path / name, members(*((key, parts) for key, parts, _ in samples)))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    path.write_bytes(damage(path.read_bytes()))
    items = read_tar(path)
    kept = pairs(items)
    assert 5 < len(kept) < 15 and rejects(items)[-1] == (name, "damaged input")
    cut = [sample_id for sample_id, _ in rejects(items)[:-1]]
    assert cut in ([], [f"00000/{samples[len(kept)][0]}"]), "the sample that was cut is named"
    for key, files, _ in samples[: len(kept)]:
        assert kept[f"00000/{key}"].image == files["jpg"], "nothing half-read"


@pytest.mark.parametrize("content", [b"", HTML, b"\0" * 100])
def test_no_tar_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert rejects(read_tar(tmp_path / "a.tar")) == [("a.tar", "damaged input")]


@pytest.mark.parametrize("name", ["a.tar.zst", "a.tar"])
def test_a_tar_that_zstd_compressed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd rest")
    write_tar(tmp_path / "b.tar", members(("0", {"jpg": b"image", "txt": b"a cat"})))
    items = read_all(list(READERS["datacomp"].chunks(Source(str(tmp_path)))))
    assert contents(items) == [("0", b"image", "a cat")]
    (reject,) = [item for item in items if isinstance(item, Reject)]
    assert (reject.id, reject.reason) == (name, "damaged input")
    assert "unpack it first (zstd -d)" in reject.detail


def test_a_flipped_header_in_a_tar(tmp_path: Path) -> None:
    samples = img2dataset_samples(0, 6)
    path = write_tar(tmp_path / "a.tar", members(*((key, parts) for key, parts, _ in samples)))
    data = bytearray(path.read_bytes())
    data[data.index(b"000000003.jpg") + 1] ^= 1
    path.write_bytes(data)
    items = read_tar(path)
    assert list(pairs(items)) == [f"a/{key}" for key, _, _ in samples[:2]]
    assert [sample_id for sample_id, _ in rejects(items)] == [f"a/{samples[2][0]}", "a.tar"]


def test_a_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_img2dataset_parquet(path, img2dataset_samples(0, 16))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert rejects(read_all(list(READERS["laion"].chunks(Source(str(path)))))) == [
        ("00000.parquet", "damaged input")
    ]
    path.write_bytes(b"")
    assert rejects(read_all(list(READERS["laion"].chunks(Source(str(path)))))) == [
        ("00000.parquet", "damaged input")
    ]


def test_columns_of_one_name_in_a_parquet(tmp_path: Path) -> None:
    """All but one of them would be lost, so the file is rejected; others may come twice."""
    for name, column in (("a", "caption"), ("b", "notes")):
        columns = {"jpg": [b"image"], "caption": ["a cat"], "second": ["a dog"], "third": ["a cow"]}
        names = ["jpg", "caption", column, column]
        table = pyarrow.table(columns).rename_columns(names)
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    items = read_all(list(READERS["laion"].chunks(Source(str(tmp_path)))))
    assert contents(items) == [("b/0", b"image", "a cat")]
    (reject,) = [item for item in items if isinstance(item, Reject)]
    assert reject.reason == "damaged input" and "have the name 'caption'" in reject.detail


def test_odd_values_in_a_parquet(tmp_path: Path) -> None:
    maps = [[("en", "a cat"), ("de", None)], []]
    table = pyarrow.table({
        "jpg": [b"0", b"1"], "uid": [2**60, None],
        "caption": pyarrow.array(maps, pyarrow.map_(pyarrow.string(), pyarrow.string())),
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_all(list(READERS["datacomp"].chunks(Source(str(tmp_path)))))
    assert isinstance(first, RawPair) and isinstance(second, RawPair)
    assert first.captions == ["a cat", None], "languages are no captions"
    assert second.captions == []
    assert (first.uid, second.uid) == (str(2**60), "")


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": b"image 0", "path": "a.jpg"}, "text": ["one", "two"]},
        {"image": {"bytes": None, "path": "b.jpg"}, "text": ["three"]},
        {"image": None, "text": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    items = read_all(list(READERS["laion"].chunks(Source(str(tmp_path)))))
    assert [
        (item.id, item.image, item.captions) for item in items if isinstance(item, RawPair)
    ] == [
        ("train-0/0", b"image 0", ["one", "two"]),
        ("train-0/1", f"{tmp_path}/b.jpg", ["three"]),
        ("train-0/2", None, None),
    ]


def test_the_last_ending_decides(tmp_path: Path) -> None:
    """The last ending counts; images with their own texts are separate samples."""
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("s.input.jpg", b"in"), ("s.outputs.txt", b"out"),
            ("photo.1.jpg", b"1"), ("photo.1.txt", b"one"),
            ("photo.2.jpg", b"2"), ("photo.2.txt", b"two"),
            ("by_kind.1.jpg", b"k1"), ("by_kind.2.jpg", b"k2"),
            ("by_kind.1.txt", b"kind one"), ("by_kind.2.txt", b"kind two"),
            ("m.jpg", b"m"), ("m.mask.png", b"mask"), ("m.txt", b"with a mask"),
        ],
    )  # fmt: skip
    items = read_tar(path)
    assert contents(items) == [
        ("a/s", b"in", "out"), ("a/photo.1", b"1", "one"), ("a/photo.2", b"2", "two"),
        ("a/by_kind.1", b"k1", "kind one"), ("a/by_kind.2", b"k2", "kind two"),
        ("a/m", b"m", "with a mask"),
    ]  # fmt: skip
    assert [item for item in items if isinstance(item, Unused)] == [Unused("files .mask.png")]


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz", "w:gz"])
def test_links_in_a_tar(mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.tar{mode[1:].replace(':', '.')}"
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data, target in (
            ("0.jpg", b"image", ""), ("0.txt", b"first", ""),
            ("1.jpg", b"", "0.jpg"), ("1.txt", b"second", ""),
            ("2.jpg", b"", "nowhere.jpg"), ("2.txt", b"third", ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size, info.linkname = len(data), target
            info.type = tarfile.LNKTYPE if target else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))
    items = read_tar(path)
    assert [(item.id, item.image) for item in items if isinstance(item, RawPair)] == [
        ("a/0", b"image"), ("a/1", b"image"),
    ]  # fmt: skip
    assert rejects(items) == [("a/2", "missing image")]


def test_rows_of_one_image(tmp_path: Path) -> None:
    """Rows with the same id and image become one record; another image does not."""
    rows: list[dict[str, Any]] = []
    for number in range(3):
        for image_id, image in ((7.0, b"seven"), (8.0, b"eight")):
            caption = f"{image_id} {number}"
            rows.append({"image": image, "caption": caption, "image_id": image_id})
    rows.append({"image": b"another", "caption": "7 4", "image_id": 7.0})
    rows.append({"image": b"gap", "caption": "no id", "image_id": None})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    items = read_all(list(READERS["laion"].chunks(Source(str(tmp_path)))))
    assert contents(items) == [
        ("7", b"seven", ["7.0 0", "7.0 1", "7.0 2"]), ("8", b"eight", ["8.0 0", "8.0 1", "8.0 2"]),
        ("7", b"another", ["7 4"]), ("x/7", b"gap", "no id"),
    ]  # fmt: skip
