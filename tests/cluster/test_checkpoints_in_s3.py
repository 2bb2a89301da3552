"""Checkpoints in a bucket, without any training: uploaded, fetched, tidied, and through outages."""

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
    """A folder of the bucket that nobody else uses."""
    return f"s3://{s3.bucket}/{uuid.uuid4().hex[:8]}/run"


def save(folder: Path, url: str, steps: list[int], **settings: object) -> bool:
    """Checkpoints of one rank, each uploaded before the next where the storage is up."""
    pieces = Pieces(even_slices(0, 1))
    remote = ObjectFolder(url, retry_s=0.5)
    settings = {"keep_last": 100, "retry_s": 0.5} | settings
    saver = pieces.saver(place_of(folder, remote), steps[0] - 1, **settings)
    for step in steps:
        saver.begin(state_of(step))
        assert saver.finish()
    return saver.is_uploaded


def in_bucket(url: str) -> set[str]:
    """Folders with a manifest, and files that lie in others."""
    names = set(ObjectFolder(url, retry_s=5).sizes())
    whole = {name.partition("/")[0] for name in names if name.endswith("/manifest.json")}
    return whole | {name for name in names if name.partition("/")[0] not in whole}


def test_two_nodes_and_a_bucket(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that lost its disk fetches its own files; one rank alone fetches all."""

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
        found = restore.newest_whole(place, stage=3)
        assert found == folder / "step_00000005"
        pieces = Pieces(even_slices(rank, ranks), filled=False)
        restore.load(found, pieces.engine, pieces.momentum)
        for kind, shard, tensor in pieces.tensors():
            expected = values(kind, shard.name)[shard.start : shard.start + shard.numel]
            assert torch.equal(tensor, expected)
        return {path.name for path in found.iterdir()} - {"manifest.json", "shared.safetensors"}

    shutil.rmtree(tmp_path / "1")
    files = FakeRanks(2, monkeypatch).run(lambda rank: load(rank, 2, tmp_path / str(rank)))
    assert files == [{"rank_00000.safetensors"}, {"rank_00001.safetensors"}]
    alone = FakeRanks(1, monkeypatch).run(lambda rank: load(0, 1, tmp_path / "elsewhere"))
    assert alone == [{"rank_00000.safetensors", "rank_00001.safetensors"}]


def test_what_is_damaged_here_is_whole_there(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And where the copy in the bucket is damaged too, the checkpoint before is taken."""
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
    """Saves go on here, and what is missing there follows with the next save that gets through."""
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
    assert "uploaded step_00000001" not in caplog.text  # it is there


def test_a_step_that_is_saved_once_more_replaces_the_old_one(url: str, tmp_path: Path) -> None:
    """Half of an upload that was given up goes when a newer one is whole."""
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
    found = restore.newest_whole(place_of(tmp_path / "third", remote), stage=3)
    assert found is not None
    fresh = Pieces(even_slices(0, 1), filled=False)
    assert restore.load(found, fresh.engine, fresh.momentum).position == {"seconds": 7.0}


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
