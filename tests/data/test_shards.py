"""The on-disk form of a record."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from data_samples import jpeg, stream

from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import Record, write_shards


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = [
        Record("plain", jpeg(0), "a", "test"),
        Record("full", jpeg(1), ("b", "ç 😀"), "test", 40, 30, "http://host/1.jpg", 0.25),
        Record("broken", b"no image", ["c"], "test"),
    ]
    write_shards(tmp_path / "set", records)
    store = StreamStore(stream(tmp_path / "set"))
    plain, full, broken = (store.read(0, i) for i in range(3))
    assert math.isnan(plain.pop("similarity"))
    assert plain == {
        "id": "plain", "image": jpeg(0), "captions": ["a"], "source": "test",
        "width": 40, "height": 30, "url": "",
    }  # fmt: skip
    assert full == {
        "id": "full", "image": jpeg(1), "captions": ["b", "ç 😀"], "source": "test",
        "width": 40, "height": 30, "url": "http://host/1.jpg", "similarity": 0.25,
    }  # fmt: skip
    assert (broken["width"], broken["height"], broken["captions"]) == (0, 0, ["c"])


def test_a_record_without_a_caption_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the record 'a' has no caption"):
        write_shards(tmp_path / "set", [Record("a", jpeg(0), [], "test")])
