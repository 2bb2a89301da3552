"""Webdataset tars in a real S3 server, read in place: their index, and what changes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from data_samples import MakeLoader, jpeg, take
from s3_server import S3Server

from blip_scale.commands import index_tars
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.reading import tar_store
from blip_scale.data.reading.cache import FETCHED_TAR_INDEX, TAR_INDEX
from blip_scale.data.reading.streams import open_stream

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]


def write_tar(path: Path, first: int, count: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            for ending, data in (("jpg", jpeg(number, (48, 40))), ("txt", b"a pair")):
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_tars_of_a_bucket(
    s3: S3Server, make_loader: MakeLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket with an index gives the batches of a folder; a changed tar asks for another."""
    for number in range(3):
        write_tar(tmp_path / "tars" / f"{number}.tar", number * 10, 10)
    remote = s3.upload(tmp_path / "tars")
    folder = StreamRecipe("red", str(tmp_path / "tars"), format="tars")
    bucket = StreamRecipe("red", str(tmp_path / "cache"), remote, "tars")
    assert index_tars.main([str(tmp_path / "tars"), "--workers", "1"]) == 0
    assert index_tars.main([remote, "--workers", "1"]) == 0
    monkeypatch.setattr(tar_store, "_LARGEST_UNINDEXED", 0)  # none is made by a reader
    expected = take(make_loader([folder]), 8)
    batches = take(make_loader([bucket], cache_limit="50kb", workers=1), 8)
    assert [batch.ids for batch in batches] == [batch.ids for batch in expected]
    assert all((a.images == b.images).all() for a, b in zip(batches, expected, strict=True))
    assert (tmp_path / "cache" / FETCHED_TAR_INDEX / "tars" / "index.json").is_file()
    assert not (tmp_path / "cache" / TAR_INDEX).exists()
    other = write_tar(tmp_path / "other" / "1.tar", 50, 10)
    s3.put(f"{remote}/1.tar", other.read_bytes())
    with pytest.raises(FileNotFoundError, match="have no current index"):
        open_stream(bucket)
    assert index_tars.main([remote, "--workers", "1"]) == 0
    store = open_stream(bucket)
    ids = [store.read(1, sample)["id"] for sample in range(10)]
    assert ids == [f"1/{number:04}" for number in range(50, 60)], "not what was cached"
