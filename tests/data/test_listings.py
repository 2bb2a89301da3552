"""Folders are listed into temporary files: the same files and order, in a few bytes each."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path
from typing import IO

import pytest
from odd_files import read_all, rejects

from blip_scale.data.conversion import spool
from blip_scale.data.conversion.listing import FileIndex, Listing
from blip_scale.data.conversion.pairs import RawPair, Reason, Reject, Source
from blip_scale.data.conversion.spool import Spool
from blip_scale.data.sources.folder import chunks
from blip_scale.storage.free_space import is_disk_full
from blip_scale.storage.locations import Entry, list_folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Links, a cycle, hidden files, names that are no UTF-8, and texts in any place."""
    tree = tmp_path / "tree"
    for folder in ("a", "a-", "a.b/deep", ".hidden"):
        (tree / folder).mkdir(parents=True)
        for number in range(40):
            (tree / folder / f"{number}.jpg").write_bytes(b"x" * number)
            (tree / folder / f"{number}.txt").write_text(f"{folder} {number}")
    for name in (b"\xff.jpg", b"\xff.txt", b"a.b.c.jpg", b"a.b.txt", b"a.b.c.caption", b"q\nq.png"):
        Path(os.fsdecode(bytes(tree) + b"/" + name)).write_bytes(name)
    (tree / "a.jpg.text").write_text("of a.jpg")
    (tree / "a.jpg").write_bytes(b"")
    (tree / "lone.txt").write_text("no image")
    for name in ("lone.gif9", "lone.abc"):
        (tree / name).touch()
    (tree / "a" / "up").symlink_to("..")
    (tree / "0").symlink_to("a")
    (tree / "zz").symlink_to("a")
    (tree / "dead.jpg").symlink_to("nowhere")
    return tree


def test_a_listing_is_that_of_the_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is sorted in several runs, and in the process that reads it."""
    monkeypatch.setattr(spool, "_RUN", 128)
    expected = list_folder(str(tree), deep=True)
    listing = Listing.of(f"{tree}/")
    assert len(expected) > 300
    assert list(listing) == expected
    borrowed = pickle.loads(pickle.dumps(listing))
    codes = [code for code, _ in borrowed.items()]
    assert codes == sorted(codes)
    for number in (0, 63, 64, 200, len(expected) - 1):
        assert borrowed.entry(codes[number]) == expected[number]
        assert [entry for _, entry in borrowed.items(codes[number])] == expected[number:]


def test_texts_are_found_whatever_lies_between(tree: Path) -> None:
    """`pairs_per_chunk` divides the folder, and changes nothing else."""
    items = read_all(list(chunks(Source(str(tree), pairs_per_chunk=7))))
    assert items == read_all(list(chunks(Source(str(tree), pairs_per_chunk=1000))))
    captions = {item.id: item.captions for item in items if isinstance(item, RawPair)}
    assert captions["a.jpg"] == "of a.jpg"
    assert captions["a.b.c.jpg"] == "a.b.c.caption"
    assert captions["\udcff.jpg"] == b"\xff.txt"
    assert captions["dead.jpg"] is None
    assert captions["a.b/deep/39.jpg"] == "a.b/deep 39"
    assert rejects(items) == [("a.b.txt", "missing image"), ("lone.txt", "missing image")]
    details = [item.detail for item in items if isinstance(item, Reject)]
    assert "lone.gif9, whose ending" in details[1]


def test_two_names_of_one_hash_are_kept_apart(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_all(list(chunks(Source(str(tree)))))
    monkeypatch.setattr("blip_scale.data.conversion.listing._hash", lambda key: bytes(8))
    assert read_all(list(chunks(Source(str(tree))))) == expected


def test_a_listing_takes_some_bytes_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here 17 for each text; the listing itself takes none."""
    monkeypatch.setattr(spool, "_RUN", 1024)

    def peak_bytes(count: int) -> int:
        entries = (Entry(f"{n:09}.txt", f"/x/{n:09}.txt", False, n) for n in range(count))
        monkeypatch.setattr(
            "blip_scale.data.conversion.listing.read_folder", lambda location, take: take(entries)
        )
        tracemalloc.start()
        index = FileIndex(Listing.of("/x"), lambda name: name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(index) == count
        return peak

    assert (peak_bytes(30_000) - peak_bytes(10_000)) / 20_000 < 60


def test_objects_that_mark_folders_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"a": 0, "a/b": 0, "a/b/c.jpg": 5, "a-": 0, "empty": 0, "full": 3, "full/x": 1}
    entries = [Entry(name, f"s3://b/{name}", False, size) for name, size in names.items()]
    monkeypatch.setattr(
        "blip_scale.data.conversion.listing.read_folder", lambda location, take: take(iter(entries))
    )
    kept = [entry.name for entry in Listing.of("s3://b")]
    assert kept == ["a-", "a/b/c.jpg", "empty", "full", "full/x"]


def test_a_full_disk_is_known_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing of a bucket is retried, but not for that."""

    def on_full_disk(dir: str) -> IO[bytes]:
        return Path("/dev/full").open("wb")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", on_full_disk)
    with pytest.raises(OSError, match="--scratch") as caught:
        Spool.of_sorted([(1,)], str(tmp_path))
    assert is_disk_full(caught.value)


@pytest.mark.parametrize(
    ("content", "encoding", "caption"),
    [
        (b"caf\xe9", "latin-1", "caf\xe9"),
        ("\u00e9".encode("utf-16"), "utf-16", "\u00e9"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", "latin-1", "caf\xe9"),
        (b"caf\xe9", "", b"caf\xe9"),
    ],
)
def test_the_encoding_of_texts(
    content: bytes, encoding: str, caption: str | bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.txt").write_bytes(content)
    (item,) = read_all(list(chunks(Source(str(tmp_path)), encoding=encoding)))
    assert isinstance(item, RawPair)
    assert item.captions == caption


def test_a_text_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (item,) = read_all(list(chunks(Source(str(tmp_path)), encoding="ascii")))
    assert rejects([item]) == [("a.jpg", Reason.CAPTION_NO_TEXT)]
    assert "a.txt is not ascii" in item.detail  # type: ignore[union-attr]
    for name in ("no-such", "hex"):
        with pytest.raises(ValueError, match=f"--encoding {name}: "):
            list(chunks(Source(str(tmp_path)), encoding=name))
