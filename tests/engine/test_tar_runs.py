"""A run on webdataset tars has the same losses as a run on shards converted from them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from tiny_runs import losses, make_recipe, records, said, train

from blip_scale.commands import prepare_data
from blip_scale.data.reading.cache import TAR_INDEX

pytestmark = pytest.mark.multiprocess


def write_tars(folder: Path) -> None:
    """Write the 64 drawings to four tars."""
    folder.mkdir()
    for number in range(4):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for index, record in enumerate(records("shapes")[number::4]):
                parts = {"png": record.image, "txt": record.captions[0].encode()}
                for ending, data in parts.items():
                    member = tarfile.TarInfo(f"{index:04}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def test_tars_give_the_losses_of_shards(tmp_path: Path) -> None:
    """Two ranks index the tars when they start, stop after three steps, and resume."""
    tars, shards = tmp_path / "tars", tmp_path / "converted"
    write_tars(tars)
    options = ["--workers", "1", "--tokenizer", "/nowhere", "--label", "shapes"]
    assert prepare_data.main(["webdataset", str(tars), str(shards), *options]) == 0
    expected = make_recipe(
        tmp_path, output_dir=str(tmp_path / "of_shards"),
        data={"streams": [{"name": "shapes", "local": str(shards)}]},
    )  # fmt: skip
    train(expected, 2)
    streams = [{"name": "shapes", "local": str(tars), "format": "tars"}]
    for steps in (3, 6):  # the second run resumes
        recipe = make_recipe(tmp_path, data={"streams": streams}, train={"max_steps": steps})
        train(recipe, 2)
    assert losses(tmp_path / "run") == losses(tmp_path / "of_shards"), said(recipe)
    assert len(losses(tmp_path / "run")) == 6
    assert (tars / TAR_INDEX / "set.json").is_file()
