"""Features of data sets in parquet files: the right ones, restartable, and an index of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_runs
import torch

from blip_scale.commands import embed
from blip_scale.data.shards import Record, write_shards
from blip_scale.inference import embeddings
from blip_scale.inference.images import pixels_of
from blip_scale.inference.loading import load_blip

BROKEN = 11
"""Number of the sample whose image cannot be decoded."""
PARTS = ("--part-size", "25", "--batch-size", "4")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    drawings = tiny_runs.records("e")
    drawings[BROKEN] = replace(drawings[BROKEN], image=b"no image", width=40, height=40)
    return drawings


@pytest.fixture(scope="module")
def shards(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed") / "shards"
    write_shards(folder, records, shard_size="8kb")
    return folder


def run(*arguments: Any, code: int = 0) -> None:
    assert embed.main([str(part) for part in arguments]) == code


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of all parts in order."""
    read: list[dict[str, Any]] = []
    for file in sorted(out.glob(f"{kind}_*.parquet")):
        read += pq.read_table(file).to_pylist()
    return read


def test_every_sample_has_a_row_and_a_restart_writes_what_is_missing(
    ours: Path, shards: Path, records: list[Record], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(shards, out, "--model", ours, "--texts", *PARTS, code=1)
    assert sorted(path.name for path in out.iterdir()) == [
        "embeddings.json",
        *(f"images_{number:05d}.parquet" for number in range(3)),
        *(f"texts_{number:05d}.parquet" for number in range(3)),
    ]
    images, texts = rows(out, "images"), rows(out, "texts")
    assert [row["id"] for row in images] == [record.id for record in records]
    assert [row["id"] for row in texts] == [record.id for record in records]
    blip = load_blip(ours)
    for number, (row, record) in enumerate(zip(images, records, strict=True)):
        if number == BROKEN:
            assert row["features"] is None and row["error"]
            continue
        pixels = pixels_of(record.image, blip.image_size)[None]
        expected = blip.image_features(blip.image_embeds(pixels))[0]
        torch.testing.assert_close(torch.tensor(row["features"]), expected, atol=1e-5, rtol=0)
        assert row["error"] is None
    expected = blip.text_features([row["caption"] for row in texts])
    features = torch.tensor([row["features"] for row in texts])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "images_00001.parquet").unlink()
    run(shards, out, "--model", ours, "--texts", *PARTS)
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"images_00001.parquet", "texts_00001.parquet"}
    assert rows(out, "images") == images


def test_another_content_is_refused(
    ours: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    content = embeddings.Content("hash", "hash", 64, 16, "float32", False, 25, 32)
    embeddings.prepare(out, content)
    run(shards, out, "--model", ours, "--half", *PARTS, code=2)
    message = capsys.readouterr().err
    assert "holds embeddings with another checkpoint, data, dtype; give another OUT" in message
    run(shards, out, "--model", ours, "--part-size", "0", code=2)
    assert "--part-size 0: expected 1 or more" in capsys.readouterr().err
    run(shards, out, "--model", ours, "--device", "abacus", code=2)
    assert "--device abacus: torch can't use it here" in capsys.readouterr().err
    for damage, problem in (("{", "is not JSON"), ("[]", "is not a manifest of embeddings")):
        (out / embeddings.MANIFEST).write_text(damage)
        run(shards, out, "--model", ours, code=2)
        assert problem in capsys.readouterr().err


def test_half_size_and_an_index_of_a_folder(
    ours: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faiss = pytest.importorskip("faiss", reason="optional: pip install faiss-cpu")
    out, folder = tmp_path / "out", tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    next(folder.glob("*.png")).rename(os.fsdecode(bytes(folder / "odd_") + b"\xff.png"))
    run(folder, out, "--model", ours, "--half", "--faiss", "--part-size", "7")
    printed = capsys.readouterr().out
    assert "16 images of 16 float16 numbers: 0.0 MB in 3 parts, 3 to write" in printed
    assert json.loads((out / embeddings.MANIFEST).read_text())["dtype"] == "float16"
    images = rows(out, "images")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    names = {row["id"] for row in images}
    assert len(names & files) == 15 and names - files == {"odd_\\udcff.png"}
    index = faiss.read_index(str(out / embeddings.INDEX))
    features = np.array([row["features"] for row in images], np.float32)
    cosines, numbers = index.search(features, 1)
    assert index.ntotal == 16
    assert [images[number]["id"] for number in numbers[:, 0]] == [row["id"] for row in images]
    np.testing.assert_allclose(cosines, 1, atol=2e-3)
    (out / "images_00001.parquet").write_bytes(b"cut")
    run(folder, out, "--model", ours, "--half", "--faiss", "--part-size", "7", code=2)
    assert "images_00001.parquet is damaged" in capsys.readouterr().err
