"""Names in folders that every user of a machine can write to, such as /tmp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip_scale.capfilt import job
from blip_scale.data.conversion.run import Part
from blip_scale.data.reading.cache import locked
from blip_scale.storage.untrusted import private_folder

REPO = Path(__file__).resolve().parents[2]


def test_a_folder_is_this_users_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "a" / "cache")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "others")
    with pytest.raises(OSError, match="is a link or a file"):
        private_folder(tmp_path / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is a link or a file"):
        private_folder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, 12345)
    with pytest.raises(OSError, match="belongs to another user"):
        private_folder(tmp_path / "cache")


def test_capfilt_caches_shards_in_such_a_folder(tmp_path: Path) -> None:
    task = job.Task(Part(), 1, str(tmp_path))
    cache = Path(job._cache("s3://bucket/shards", task))
    assert cache.parent == tmp_path and cache.stat().st_mode & 0o777 == 0o700
    assert job._cache("s3://bucket/shards", task) == str(cache), "tasks of a node share it"
    cache.rmdir()
    (tmp_path / "others").mkdir()
    cache.symlink_to(tmp_path / "others")
    with pytest.raises(OSError, match="is a link"):
        job._cache("s3://bucket/shards", task)


def test_locks_follow_no_links(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks" / "room").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path, "room"):
        pass
    assert (tmp_path / "precious").read_text() == "content"


def test_locks_still_lock(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from blip_scale.data.reading.cache import locked\n"
        "with locked(Path(sys.argv[1]), 'room', wait=False) as held: print(held)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]

    def held_elsewhere() -> str:
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with locked(tmp_path, "room") as held:
        assert held and held_elsewhere() == "False"
    assert held_elsewhere() == "True"
