"""Checkpoints in a bucket, without training: upload, download, retention and outages."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from pathlib import Path

import pytest
import torch
from checkpoint_pieces import (
    Pieces,
    even_slices,
    flip_a_byte,
    place_of,
    state_of,
    values,
)
from fake_ranks import FakeRanks
from s3_server import S3Server

from blip_scale.engine.checkpoints import restore
from blip_scale.storage.objects import ObjectFolder

pytestmark = pytest.mark.s3


@pytest.fixture
def url(s3: S3Server) -> str:
    """A folder of the bucket for this test alone."""
    return f"s3://{s3.bucket}/{uuid.uuid4().hex[:8]}/run"


def save(folder: Path, url: str, steps: list[int], **settings: object) -> bool:
    """Save checkpoints of one rank, uploading each before the next; True if all are uploaded."""
    pieces = Pieces(even_slices(0, 1))
    remote = ObjectFolder(url, retry_s=0.5)
    settings = {"keep_last": 100, "retry_s": 0.5} | settings
    saver = pieces.saver(place_of(folder, remote), steps[0] - 1, **settings)
    for step in steps:
        saver.begin(state_of(step))
        assert saver.finish()
    return saver.is_uploaded


def in_bucket(url: str) -> set[str]:
    """Names of folders with a manifest, and of files that lie in other folders."""
    names = set(ObjectFolder(url, retry_s=5).sizes())
    whole = {name.partition("/")[0] for name in names if name.endswith("/manifest.json")}
    return whole | {name for name in names if name.partition("/")[0] not in whole}


def test_two_nodes_and_a_bucket(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that lost its disk fetches its own files; a single rank fetches all files."""

    def save_on_nodes(rank: int) -> None:
        pieces = Pieces(even_slices(rank, 2))
        place = place_of(tmp_path / str(rank), ObjectFolder(url, retry_s=5), is_shared=False)
        saver = pieces.saver(place, keep_last=1, keep_every=2)
        for step in (1, 2, 3, 4, 5):
            saver.begin(state_of(step))
            assert saver.finish()
        assert set(pieces.curves[5]) == {"checkpoint/upload_s"}  # came last

    FakeRanks(2, monkeypatch).run(save_on_nodes)
    kept = {"step_00000002", "step_00000004", "step_00000005"}
    assert in_bucket(url) == kept
    for rank in range(2):
        assert {path.name for path in (tmp_path / str(rank)).iterdir()} == kept

    def load(rank: int, ranks: int, folder: Path) -> set[str]:
        place = place_of(folder, ObjectFolder(url, retry_s=5), is_shared=False)
        newest = restore.newest_whole(place, stage=3)
        assert newest == folder / "step_00000005"
        pieces = Pieces(even_slices(rank, ranks), filled=False)
        restore.load(newest, pieces.engine, pieces.momentum)
        for kind, shard, tensor in pieces.tensors():
            expected = values(kind, shard.name)[shard.start : shard.start + shard.numel]
            assert torch.equal(tensor, expected)
        return {path.name for path in newest.iterdir()} - {"manifest.json", "shared.safetensors"}

    shutil.rmtree(tmp_path / "1")
    files = FakeRanks(2, monkeypatch).run(lambda rank: load(rank, 2, tmp_path / str(rank)))
    assert files == [{"rank_00000.safetensors"}, {"rank_00001.safetensors"}]
    alone = FakeRanks(1, monkeypatch).run(lambda rank: load(0, 1, tmp_path / "elsewhere"))
    assert alone == [{"rank_00000.safetensors", "rank_00001.safetensors"}]


def test_what_is_damaged_here_is_whole_there(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the copy in the bucket is damaged as well, the checkpoint before it is used."""
    save(tmp_path, url, [4, 5])
    place = place_of(tmp_path, ObjectFolder(url, retry_s=5))
    for file in ("rank_00000.safetensors", "shared.safetensors"):
        flip_a_byte(tmp_path / "step_00000005" / file)
    (tmp_path / "step_00000005" / "manifest.json").write_text("{")
    assert restore.newest_whole(place, stage=3) == tmp_path / "step_00000005"
    assert "manifest.json cannot be read" in caplog.text

    file = tmp_path / "step_00000005" / "rank_00000.safetensors"
    flip_a_byte(file)
    assert place.remote is not None
    place.remote.put("step_00000005/rank_00000.safetensors", file)
    assert restore.newest_whole(place, stage=3) == tmp_path / "step_00000004"
    assert "rank_00000.safetensors is damaged in s3://" in caplog.text


def test_the_storage_is_down_and_comes_back(
    s3: S3Server, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saves continue locally, and the next successful save uploads what is missing."""
    caplog.set_level(logging.INFO)
    assert save(tmp_path, url, [1])
    s3.stop()
    assert not save(tmp_path, url, [2])
    assert "step_00000002 was not uploaded" in caplog.text
    assert "step_00000002 not uploaded to s3://" in caplog.text
    assert restore.newest_whole(place_of(tmp_path, ObjectFolder(url, 0.5)), stage=3) == (
        tmp_path / "step_00000002"
    )
    with pytest.raises(OSError, match="can't be listed, tried"):
        restore.newest_whole(place_of(tmp_path / "new", ObjectFolder(url, 0.5)), stage=3)
    s3.start()
    caplog.clear()
    assert save(tmp_path, url, [3])
    assert in_bucket(url) == {"step_00000001", "step_00000002", "step_00000003"}
    assert "uploaded step_00000001" not in caplog.text  # the file exists


def test_a_step_that_is_saved_once_more_replaces_the_old_one(url: str, tmp_path: Path) -> None:
    """An incomplete upload is deleted when a newer checkpoint is complete."""
    save(tmp_path / "first", url, [4, 5])
    remote = ObjectFolder(url, retry_s=5)
    remote.delete(["step_00000004/manifest.json"])
    other = state_of(5)
    other.position["seconds"] = 7.0
    pieces = Pieces(even_slices(0, 1))
    saver = pieces.saver(place_of(tmp_path / "second", remote), 0)
    saver.begin(other)
    assert saver.finish()
    assert in_bucket(url) == {"step_00000005"}
    newest = restore.newest_whole(place_of(tmp_path / "third", remote), stage=3)
    assert newest is not None
    fresh = Pieces(even_slices(0, 1), filled=False)
    assert restore.load(newest, fresh.engine, fresh.momentum).position == {"seconds": 7.0}


@pytest.mark.parametrize("problem", ["no such bucket", "no rights"])
def test_a_refusal_is_said_at_once(
    problem: str, s3: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if problem == "no rights":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    else:
        url = "s3://no-such-bucket/run"
    place, began = place_of(tmp_path, ObjectFolder(url, retry_s=60)), time.monotonic()
    with pytest.raises(FileNotFoundError, match=f"{url} can't be listed.*(NoSuchB|Signat)"):
        restore.newest_whole(place, stage=3)
    assert time.monotonic() - began < 10
