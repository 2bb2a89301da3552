"""Held-out pairs by index."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_samples import MakeShards, stream

from blip_scale.data import heldout_pairs


def test_pairs_come_in_their_order_with_clean_captions(make_shards: MakeShards) -> None:
    pairs = heldout_pairs(stream(make_shards("red", 20)), image_size=16)
    assert len(pairs) == 20
    assert pairs.ids == [f"red-{i}" for i in range(20)]
    assert set(pairs.captions) == {"a pair, red"} and set(pairs.sources) == {"red"}
    images = pairs.images([3, 0])
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images[1], pairs.images([0])[0])


def test_fewer_pairs_are_spread_over_the_set(make_shards: MakeShards) -> None:
    pairs = heldout_pairs(stream(make_shards("red", 20)), image_size=16, max_pairs=5)
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
        heldout_pairs(stream(tmp_path / "none"), 16, make_with="make it")
