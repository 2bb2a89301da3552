"""`train.py --dry-run` against a real S3 server, with and without access rights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from s3_server import S3Server
from tiny_runs import make_recipe, run_forked

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]


def test_rights_of_a_bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recipe(tmp_path)
    remote = s3.upload(tmp_path / "shapes")
    stream = json.dumps([{"name": "shapes", "local": str(tmp_path / "cache"), "remote": remote}])
    recipe = make_recipe(tmp_path)
    arguments = ["--recipe", str(recipe), "--dry-run", "--gpu", "h100"]
    arguments += [f"data.streams={stream}", "data.cache_limit=100mb"]
    arguments += [f"checkpoint.folder=s3://{s3.bucket}/checkpoints"]
    done = run_forked(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "ok      stream shapes: 64 samples" in done.stderr
    assert "ok      cache" in done.stderr
    assert "written, read back and deleted" in done.stderr
    listed = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix="checkpoints/")
    assert listed["KeyCount"] == 0

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    done = run_forked(tmp_path, *arguments, "data.retry_s=2")
    assert done.returncode == 2
    assert "FAILED  stream shapes" in done.stderr and "can't be fetched" in done.stderr
    assert "FAILED  checkpoints" in done.stderr
