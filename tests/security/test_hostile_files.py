"""Weights, shards, manifests and capfilt sheets from strangers."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from blip_scale.capfilt import sheet
from blip_scale.data.mds import Writer, read_index
from blip_scale.interop import bert, vision
from blip_scale.storage import checkpoint_format


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * 64


def entry(**changes: Any) -> bytes:
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}
    return json.dumps({"weight/a": tensor}).encode()


ABSURD = {
    "length of 2**63": safetensors(b"{}", 1 << 63),
    "length beyond the file": safetensors(b"{}", 1 << 26),
    "no JSON": safetensors(b"\xff" * 50),
    "deep": safetensors(b"[" * 100_000),
    "offsets beyond the file": safetensors(entry(data_offsets=[0, 1 << 40], shape=[1 << 38])),
    "shape of another size": safetensors(entry(shape=[1 << 60])),
    "shape that overflows": safetensors(entry(shape=[1 << 62, 1 << 62])),
    "negative offsets": safetensors(entry(data_offsets=[-16, 0])),
    "unknown type": safetensors(entry(dtype="X99")),
    "empty": b"",
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_headers_of_safetensors(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(ABSURD[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reads: list[Callable[[], Any]] = [
        lambda: vision._read(tmp_path / "model.safetensors"),
        lambda: bert._read(str(tmp_path)),
    ]
    for read in reads:
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            read()
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 200_000


def test_a_packed_shard_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    """Decompression of a zstd bomb stops at the size that the index states."""
    with Writer(tmp_path / "set", {"id": "str"}, 10_000, "zstd") as writer:
        writer.write({"id": "a" * 500})
    file = tmp_path / "set" / "index.json"
    index = json.loads(file.read_text())
    bomb = pyarrow.compress(b"\0" * (256 << 20), "zstd", asbytes=True)
    assert len(bomb) < 100_000
    packed = index["shards"][0]["zip_data"]
    packed["bytes"] = len(bomb)
    file.write_text(json.dumps(index))
    (shard,) = read_index(tmp_path / "set")
    with pytest.raises(ValueError, match="decompresses to"):
        shard.decompress(bomb, tmp_path / "unpacked")
    target = tmp_path / "unpacked"
    assert not target.exists() or target.stat().st_size < (8 << 20)


@pytest.mark.parametrize(
    "name", ["../../../home/x", "/etc/x", "a/b", "..", "", "a\\b", "x\n", "file:///etc/x"]
)
def test_manifests_name_files_of_their_folder(name: str, tmp_path: Path) -> None:
    """All readers use this function: restoring, fetching from a bucket, converting, predicting."""
    files = {name: {"bytes": 1, "xxh3": "0" * 16}, "shared.safetensors": {"bytes": 1, "xxh3": "0"}}
    manifest = {
        "step": 1, "world_size": 1, "stage": 3, "optimizer_steps": 1, "parameters": {"a": 1},
        "files": files, "position": {}, "task": {},
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        checkpoint_format.read_manifest(tmp_path)


def test_captions_are_no_markup_on_the_sheet() -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    shown = sheet._Shown(evil, b"no image", [(evil, 0.5, evil, True), ("web", 0.1, evil, False)])
    card = sheet._card(shown)
    assert "<script" not in card and "<img" not in card
    assert card.count("alert(1)") == 4
