"""Held-out pairs by index."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from data_samples import MakeShards, jpeg, stream
from s3_server import environment

from blip_scale.config.recipe import DataRecipe, StreamRecipe
from blip_scale.data.heldout.pairs import heldout_pairs
from blip_scale.data.shards import Record, write_shards


def test_pairs_come_in_their_order_with_clean_captions(make_shards: MakeShards) -> None:
    pairs = heldout_pairs(stream(make_shards("red", 20)), image_size=16)
    assert len(pairs) == 20
    assert pairs.ids == [f"red-{i}" for i in range(20)]
    assert pairs.captions == [["a pair, red"]] * 20 and set(pairs.sources) == {"red"}
    images = pairs.images([3, 0])
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images[1], pairs.images([0])[0])


def test_fewer_pairs_are_spread_over_the_set(make_shards: MakeShards) -> None:
    pairs = heldout_pairs(stream(make_shards("red", 20)), image_size=16, max_images=5)
    assert pairs.ids == [f"red-{i}" for i in (0, 4, 8, 12, 16)]


def test_an_unreadable_image_is_grey_and_named(
    make_shards: MakeShards, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = heldout_pairs(stream(make_shards("red", 6, corrupt=frozenset({2}))), image_size=16)
    for _ in range(2):
        assert pairs.images(range(6))[2].unique().tolist() == [128]
    assert list(pairs.unreadable) == ["red-2"]
    assert caplog.text.count("red-2") == 1


def test_a_missing_set_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"stream 'none'.*make it with `make it`"):
        heldout_pairs(stream(tmp_path / "none"), 16, DataRecipe(make_with="make it"))


def test_all_captions_of_an_image_are_its_own(tmp_path: Path) -> None:
    records = [Record(f"{i}", jpeg(i), ["A cat."] * (i + 1), "s") for i in range(3)]
    write_shards(tmp_path / "set", records)
    pairs = heldout_pairs(stream(tmp_path / "set"), 16)
    assert pairs.captions == [["a cat"], ["a cat"] * 2, ["a cat"] * 3]


def test_a_remote_is_asked_as_long_as_the_recipe_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The default of a quarter of an hour is not used."""
    away = StreamRecipe("away", str(tmp_path / "cache"), "s3://nowhere/set")
    caplog.set_level("WARNING")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment("http://127.0.0.1:9").items():
            patch.setenv(name, value)
        with pytest.raises(FileNotFoundError):  # the first client of a process is slow to start
            heldout_pairs(away, 16, DataRecipe(retry_s=0))
        start_s = time.monotonic()
        with pytest.raises(FileNotFoundError, match=r"stream 'away': s3://nowhere/set/index.json"):
            heldout_pairs(away, 16, DataRecipe(retry_s=1.5))
    assert "for up to 1 s more" in caplog.text or "for up to 2 s more" in caplog.text
    assert time.monotonic() - start_s < 10
