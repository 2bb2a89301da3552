"""Pairs that are accepted or rejected with a reason, and what is written."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_files import (
    BAD_IMAGES,
    EMOJI_CAPTION,
    GOOD_IMAGES,
    RIGHT_TO_LEFT_CAPTION,
    encoded,
    photo,
    turned,
)
from PIL import Image

from blip_scale.data.conversion.pairs import RawPair, Reason, Reject
from blip_scale.data.conversion.screening import Rules, screen
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.shards import Record

RULES = Rules("test")
IMAGE = GOOD_IMAGES["jpeg"]


def accepted(pair: RawPair, rules: Rules = RULES) -> Record:
    record, rejects, _ = screen(pair, rules)
    assert record is not None and not rejects, rejects
    return record


def refused(pair: RawPair, rules: Rules = RULES) -> Reject:
    record, rejects, anew = screen(pair, rules)
    assert record is None and not anew
    (reject,) = rejects
    assert reject.id == pair.id and reject.caption is None
    return reject


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_good_images_keep_their_bytes(name: str) -> None:
    data = GOOD_IMAGES[name]
    record = accepted(RawPair("a", data, "A dog.", "http://host/a", 0.25))
    assert record == Record("a", data, ["a dog"], "test", 80, 60, "http://host/a", 0.25)
    assert decode_image(record.image).size == (80, 60), "and training decodes them"


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_have_a_reason(name: str) -> None:
    data, reason = BAD_IMAGES[name]
    first, second = (refused(RawPair("a", data, "a dog")) for _ in range(2))
    assert first.reason == reason and first == second, "the same words in every run"
    assert " at 0x" not in first.detail


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int) -> None:
    data = turned(orientation)
    record, _, anew = screen(RawPair("a", data, "a dog"), RULES)
    assert record is not None
    assert anew == (orientation != 1) and (record.image == data) == (orientation == 1)
    image = decode_image(record.image)
    assert (record.width, record.height) == image.size
    assert image.size == ((80, 60) if orientation < 5 else (60, 80))
    flips = [
        [], [Image.Transpose.FLIP_LEFT_RIGHT], [Image.Transpose.ROTATE_180],
        [Image.Transpose.FLIP_TOP_BOTTOM], [Image.Transpose.TRANSPOSE],
        [Image.Transpose.ROTATE_270], [Image.Transpose.TRANSVERSE], [Image.Transpose.ROTATE_90],
    ][orientation - 1]  # fmt: skip
    expected = photo()
    for flip in flips:
        expected = expected.transpose(flip)
    error = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).mean()
    assert error < 4, "JPEG twice"
    assert Image.open(io.BytesIO(record.image)).getexif().get(0x0112, 1) == 1


def test_large_images_are_scaled_to_their_shorter_side() -> None:
    rules = Rules("test", max_side=30, min_side=10)
    record, _, anew = screen(RawPair("a", IMAGE, "a dog"), rules)
    assert record is not None and anew
    assert decode_image(record.image).size == (40, 30) == (record.width, record.height)
    assert Image.open(io.BytesIO(record.image)).format == "JPEG"
    small = encoded(photo(size=(300, 30)), "PNG")
    assert accepted(RawPair("a", small, "a dog"), rules).image == small
    coarse, _, _ = screen(RawPair("a", IMAGE, "a dog"), Rules("test", max_side=30, jpeg_quality=10))
    assert coarse is not None and len(coarse.image) < len(record.image)


def test_the_limits_are_inclusive() -> None:
    pair = RawPair("a", encoded(photo(size=(320, 32))), "a dog")
    accepted(pair)
    assert refused(pair, Rules("test", min_side=33)).reason is Reason.TOO_SMALL
    assert refused(pair, Rules("test", max_aspect=9.9)).detail == "320x32"
    accepted(pair, Rules("test", max_pixels=320 * 32))
    assert refused(pair, Rules("test", max_pixels=320 * 32 - 1)).reason is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    ("captions", "written"),
    [
        ("A Dog, running!", ["a dog, running"]),
        (EMOJI_CAPTION, [EMOJI_CAPTION]),
        (RIGHT_TO_LEFT_CAPTION, [RIGHT_TO_LEFT_CAPTION]),
        (["One.", "Two!", "One."], ["one", "two", "one"]),
        (" ".join(f"w{i}" for i in range(50)), [" ".join(f"w{i}" for i in range(30))]),
    ],
)
def test_captions_are_cleaned(captions: Any, written: list[str]) -> None:
    assert accepted(RawPair("a", IMAGE, captions)).captions == written


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "missing caption"),
        ([], "missing caption"),
        ([None], "missing caption"),
        (math.nan, "missing caption"),
        ("", "empty caption"),
        ("...", "empty caption"),
        ("\t", "empty caption"),
        (["", " "], "empty caption"),
        (17, "caption is no text"),
        ({"text": "a dog"}, "caption is no text"),
        (b"\xff\xfe", "caption is no text"),
        ("half \ud83d", "caption is no text"),
        ([["a dog"]], "caption is no text"),
    ],
)
def test_captions_that_are_none(caption: Any, reason: str) -> None:
    assert refused(RawPair("a", IMAGE, caption)).reason == reason


def test_single_captions_are_rejected_alone() -> None:
    record, rejects, _ = screen(RawPair("a", IMAGE, ["A dog.", "", None, "a cat", 3]), RULES)
    assert record is not None and record.captions == ["a dog", "a cat"]
    assert [(r.caption, str(r.reason)) for r in rejects] == [
        (1, "empty caption"), (2, "missing caption"), (4, "caption is no text"),
    ]  # fmt: skip


def test_images_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGE)
    assert accepted(RawPair("a", str(tmp_path / "a.jpg"), "a dog")).image == IMAGE
    assert accepted(RawPair("a", f"file://{tmp_path}/a.jpg", "a dog")).image == IMAGE
    for place in (None, str(tmp_path / "b.jpg"), str(tmp_path), "http://127.0.0.1:9/a.jpg"):
        assert refused(RawPair("a", place, "a dog")).reason is Reason.MISSING_IMAGE
    for name in ("x" * 300, "a\0.jpg", "half \ud83d.jpg", "a.jpg/b.jpg"):
        assert refused(RawPair("a", f"{tmp_path}/{name}", "a dog")).reason is Reason.MISSING_IMAGE
