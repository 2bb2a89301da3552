"""Two conversions into the same prefix of a bucket, and a restart with another input."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

import pytest
from data_samples import jpeg
from s3_server import S3Server

from blip_scale.commands import prepare_data, show_shards
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.conversion import locks
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.reading.stream_store import StreamStore

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]


def make_images(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, (80, 60)))
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder


def convert(*arguments: str) -> int:
    return prepare_data.main(["folder", *arguments, "--workers", "1", "--tokenizer", "/nowhere"])


def test_keys_are_taken_literally(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OUT may contain # and ?. Locks and drafts are removed; a second run changes nothing."""
    images = make_images(tmp_path / "images")
    root = f"s3://{s3.bucket}/{uuid.uuid4().hex[:8]}"
    for name in ("a#b", "a?b"):
        assert convert(str(images), f"{root}/{name}") == 0
        names = s3.names(f"{root}/{name}/")
        assert {"index.json", "conversion.json", "000000.json"} <= names
        assert not [name for name in names if "lock" in name]
    assert not s3.names(f"{root}/a/")
    assert convert(str(images), f"{root}/a#b") == 0
    (images / "0.txt").write_text("another")
    assert convert(str(images), f"{root}/a#b") == 2
    assert "content, size or time" in capsys.readouterr().err
    assert convert(str(images), f"{root}/a#b", "--overwrite") == 0
    store = StreamStore(StreamRecipe("cache", str(tmp_path / "cache"), f"{root}/a#b"))
    assert [store.read(0, i)["captions"] for i in range(3)] == [
        ["another"], ["number 1"], ["number 2"],
    ]  # fmt: skip


def test_images_of_a_bucket_are_part_of_the_input(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images(tmp_path / "images")
    (images / "2.jpg").rename(tmp_path / "2.jpg")
    rows = [f"{number}.jpg,number {number}\n" for number in range(3)]
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(rows))
    remote = s3.upload(images)
    arguments = [str(tmp_path / "captions.csv"), str(tmp_path / "out"), "--images", remote]
    assert convert(*arguments) == 0
    assert "missing image: 1" in capsys.readouterr().out
    assert convert(*arguments) == 0, "the same again"
    s3.put(f"{remote}/2.jpg", (tmp_path / "2.jpg").read_bytes())
    assert convert(*arguments) == 2
    assert "content, size or time" in capsys.readouterr().err
    assert convert(*arguments, "--overwrite") == 0


def test_the_second_of_two_is_refused(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second conversion is refused, unless the first is another part, silent too long, or
    dead."""
    images = make_images(tmp_path / "images")
    out = f"s3://{s3.bucket}/{uuid.uuid4().hex[:8]}"
    with locks.held(OutputFolder(out), 0, 2):
        assert convert(str(images), out) == 2
        message = capsys.readouterr().err
        assert f"another conversion is writing here (process {os.getpid()} on" in message
        assert "part 0/2" in message
        assert convert(str(images), out, "--shard", "2/4") == 2, "has chunks of part 0/2"
        assert convert(str(images), out, "--shard", "1/2") == 0
    assert not [name for name in s3.names(f"{out}/") if "lock" in name]
    holder = {"host": "elsewhere", "pid": 1, "part": "0/1", "since": "long ago"}
    s3.put(f"{out}/lock-0-of-1-abc", json.dumps(holder).encode())
    assert convert(str(images), out) == 2
    assert "process 1 on elsewhere" in capsys.readouterr().err
    s3.put(f"{out}/lock-0-of-1-abc", json.dumps(holder | dead_process()).encode())
    assert convert(str(images), out) == 0


def dead_process() -> dict[str, str | int]:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return {"host": os.uname().nodename, "pid": child}


def test_shards_in_folders_below_the_index(s3: S3Server, tmp_path: Path) -> None:
    """The layout of MosaicML's merge_index is read from a bucket."""
    shards = []
    for part in ("00", "01"):
        images = make_images(tmp_path / f"images{part}")
        assert convert(str(images), str(tmp_path / "set" / part)) == 0
        for shard in json.loads((tmp_path / "set" / part / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{part}/{shard['raw_data']['basename']}"
            shards.append(shard)
    index = {"version": 2, "shards": shards}
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    remote = f"s3://{s3.bucket}/{uuid.uuid4().hex[:8]}"
    for path in (tmp_path / "set").rglob("*"):
        if path.is_file():
            s3.put(f"{remote}/{path.relative_to(tmp_path / 'set')}", path.read_bytes())
    for store in (
        StreamStore(StreamRecipe("set", str(tmp_path / "set"))),
        StreamStore(StreamRecipe("set", str(tmp_path / "cache"), remote)),
    ):
        captions = [store.read(shard, i)["captions"] for shard in range(2) for i in range(3)]
        assert captions == [["number 0"], ["number 1"], ["number 2"]] * 2
    shutil.rmtree(tmp_path / "cache")


def test_held_out_pairs_in_a_bucket(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two parts, merged again: the set beside the other under the same prefix."""
    images = make_images(tmp_path / "images", 40)
    remote = f"s3://{s3.bucket}/{uuid.uuid4().hex[:8]}/set"
    arguments = [str(images), remote, "--pairs-per-chunk", "10", "--holdout", "5"]
    assert convert(*arguments, "--shard", "1/2") == 0
    assert convert(*arguments, "--shard", "0/2") == 0
    shown = capsys.readouterr().out
    assert "pairs: 40 read = 35 written + 5 held out + 0 rejected" in shown
    assert f"remote: {remote}/heldout" in shown
    local = tmp_path / "local"
    assert convert(str(images), str(local), *arguments[2:]) == 0
    ids = []
    for name, place in (("train", remote), ("heldout", f"{remote}/heldout")):
        store = StreamStore(StreamRecipe(name, str(tmp_path / name), place))
        beside = StreamStore(StreamRecipe(name, str(local / place.partition("/set/")[2])))
        for shard, count in enumerate(store.shard_samples):
            ids += [store.read(shard, index)["id"] for index in range(count)]
        assert store.shard_samples.tolist() == beside.shard_samples.tolist()
    assert len(ids) == len(set(ids)) == 40
    capsys.readouterr()
    sheet = tmp_path / "sheet.html"
    assert show_shards.main([f"{remote}/heldout", "--count", "9", "--sheet", str(sheet)]) == 0
    assert ": 5 samples in" in capsys.readouterr().out
    assert sheet.read_text().count("data:image/jpeg;base64,") == 5
    assert convert(str(images), remote, "--merge") == 0
    assert convert(*arguments[:-2], "--overwrite") == 0
    assert not [name for name in s3.names(f"{remote}/") if "chosen" in name]
