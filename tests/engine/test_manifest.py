"""Test the manifest of a run over several starts, and its description of code and data."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import xxhash

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.reading.inventory import inventory
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import write_shards
from blip_scale.engine.watching.run_manifest import RunManifest, software


def state(**changes: Any) -> dict[str, Any]:
    stream = {"name": "coco", "index_xxh64": "aa"}
    return {
        "recipe": {"seed": 1, "betas": (0.9, 0.99)},
        "code": {"commit": "abc", "dirty": False},
        "packages": {"torch": "2.0"},
        "data": [stream | changes.pop("stream", {})],
    } | changes


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_starts_checkpoints_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = tmp_path / "step_00000003"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    first = RunManifest(tmp_path, is_main=True)
    first.begin(state(), {"job_id": "1", "world_size": 2, "from": None}, {})
    first.saved(3, checkpoint)
    second = RunManifest(tmp_path, is_main=True)  # the first start was killed
    second.begin(state(), {"job_id": "2", "world_size": 1}, {"step": 4})
    second.saved(6, tmp_path / "elsewhere")
    second.ended(7, "stopped on request")
    content = read(tmp_path)
    assert content["state"]["data"] == [{"name": "coco", "index_xxh64": "aa"}]
    killed, stopped = content["attempts"]
    assert (killed["job_id"], killed["world_size"], killed["changed"]) == ("1", 2, [])
    assert killed["ended"] == {"why": "not known", "step": 4}
    assert (stopped["ended"]["why"], stopped["ended"]["step"]) == ("stopped on request", 7)
    saved, gone = content["checkpoints"]
    assert (saved["step"], saved["attempt"], saved["checkpoint"]) == (3, 0, str(checkpoint))
    assert saved["manifest_xxh64"] == xxhash.xxh64(b"{}").hexdigest()
    assert (gone["step"], gone["attempt"], gone["manifest_xxh64"]) == (6, 1, None)
    assert not caplog.messages


def test_what_changed_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    RunManifest(tmp_path, is_main=True).begin(state(), {}, {})
    changed = state(
        recipe={"seed": 2, "betas": (0.9, 0.99)},
        code={"commit": "def", "dirty": False},
        stream={"index_xxh64": "bb"},
    )
    RunManifest(tmp_path, is_main=True).begin(changed, {}, {})
    levels = {record.getMessage(): record.levelno for record in caplog.records}
    before = "changed since the previous start: "
    assert levels == {
        before + "recipe.seed: 1 -> 2": logging.WARNING,
        before + 'code.commit: "abc" -> "def"': logging.WARNING,
        before + 'data.coco.index_xxh64: "aa" -> "bb"': logging.WARNING,
    }
    content = read(tmp_path)
    assert content["attempts"][1]["changed"] == [name.removeprefix(before) for name in levels]
    assert content["state"]["code"]["commit"] == "def"


DAMAGED = [
    '{"state": {',
    "[]",
    "[" * 100_000,
    '{"state": [], "attempts": [], "checkpoints": []}',
    '{"state": {}, "attempts": [7], "checkpoints": []}',
    '{"state": {}, "attempts": [{"endee": null}], "checkpoints": []}',
    '{"state": {}, "attempts": [], "checkpoints": null}',
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_put_aside(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "manifest.json").write_text(text)
    manifest = RunManifest(tmp_path, is_main=True)
    manifest.begin(state(), {}, {})
    manifest.saved(1, tmp_path)
    manifest.ended(1, "done")
    assert "cannot be read" in caplog.messages[0]
    assert (tmp_path / "manifest.damaged").read_text() == text
    assert len(read(tmp_path)["attempts"]) == 1


def test_a_disk_that_fails_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = RunManifest(tmp_path / "no" / "folder", is_main=True)
    manifest.begin(state(), {}, {})
    manifest.ended(3, "done")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    manifest = RunManifest(tmp_path, is_main=False)
    manifest.begin(state(), {}, {})
    manifest.saved(1, tmp_path)
    manifest.ended(1, "done")
    assert not list(tmp_path.iterdir())


def test_code_and_packages(repo: Path) -> None:
    versions = software()
    assert versions["packages"]["torch"] == torch.__version__.partition("+")[0]
    if (repo / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(repo), "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert versions["code"]["commit"] == head.stdout.strip()
        assert isinstance(versions["code"]["dirty"], bool)


def test_the_inventory_is_a_line_a_stream_with_the_hash_of_its_index(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    write_shards(folder, tiny_runs.records("shapes"), shard_size="8kb")
    index = (folder / "index.json").read_bytes()
    assert inventory([StreamStore(StreamRecipe("shapes", str(folder)))]) == [
        {
            "name": "shapes", "local": str(folder), "remote": None, "samples": 64, "shards": 3,
            "bytes": sum(path.stat().st_size for path in folder.glob("*.mds")),
            "index_xxh64": xxhash.xxh64(index).hexdigest(),
        }
    ]  # fmt: skip
