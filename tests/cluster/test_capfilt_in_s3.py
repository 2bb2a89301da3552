"""CapFilt from a bucket to a bucket, through a process that is restarted."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_blip
import tiny_runs
from s3_server import S3Server

from blip_scale.commands import capfilt
from blip_scale.data.shards import write_shards

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]


def test_a_bucket_gets_the_bytes_of_a_folder(s3: S3Server, tmp_path: Path) -> None:
    """Read the set through a cache."""
    words = tiny_blip.vocabulary(tmp_path / "words" / "vocabulary")
    blip = str(tiny_blip.write_ours(tmp_path / "step_00000007", tiny_blip.config(words), words))
    write_shards(tmp_path / "web", tiny_runs.records("web"), shard_size="6kb")
    options = ["--captioner", blip, "--filter", blip, "--device", "cpu", "--workers", "1"]
    options += ["--scratch", str(tmp_path / "scratch")]
    (tmp_path / "scratch").mkdir()
    alone, remote = tmp_path / "alone", f"s3://{s3.bucket}/clean"
    assert capfilt.main([str(tmp_path / "web"), str(alone), *options]) == 0
    web = s3.upload(tmp_path / "web")
    assert capfilt.main([web, remote, *options]) == 0
    files = [path.relative_to(alone) for path in alone.rglob("*") if path.is_file()]
    assert len(files) > 8
    for name in files:
        assert s3.get(f"{remote}/{name}") == (alone / name).read_bytes(), name
    assert list((tmp_path / "scratch").glob("capfilt-*/*.mds"))
