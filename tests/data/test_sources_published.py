"""Sets that are published as lists of URLs: their columns, and filters by their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_samples import jpeg
from odd_files import (
    img2dataset_meta,
    members,
    pairs,
    read_all,
    write_img2dataset_parquet,
    write_tar,
)

from blip_scale.commands import prepare_data
from blip_scale.data.captions import RoleText
from blip_scale.data.conversion.pairs import RawPair, Reason, Reject, Source
from blip_scale.data.conversion.screening import Rules, screen
from blip_scale.data.shards import read_index
from blip_scale.data.sources.metadata import pair_of
from blip_scale.data.sources.published import SETS, recognised
from blip_scale.data.sources.readers import READERS

LISTS: dict[str, dict[str, Any]] = {
    "datacomp": {
        "uid": "a9661a41140dd60e8774195e22cc7160", "url": "http://a/1", "text": "earrings",
        "original_width": 560, "original_height": 840, "clip_b32_similarity_score": 0.3125,
        "clip_l14_similarity_score": 0.25, "face_bboxes": [], "sha256": "0" * 64,
    },
    "recap_datacomp": {
        "url": "http://a/1", "re_caption": "Silver earrings.", "org_caption": "EARRINGS SPIKE",
        "sha256": "0" * 64, "key": "k", "re_clip_score": 0.25, "org_clip_score": 0.5,
        "re_length": 2, "org_length": 2, "re_gpt4v_score": 4, "org_gpt4v_score": 2,
    },
    "pixelprose": {
        "uid": "u", "url": "http://a/1", "key": "k", "status": "success",
        "original_caption": "EARRINGS SPIKE", "vlm_model": "gemini", "vlm_caption": "Silver rings.",
        "toxicity": 0.0, "aesthetic_score": 5.5, "watermark_class_id": 1,
        "watermark_class_score": 0.875, "sha256": "0" * 64,
    },
    "capsfusion": {
        "image_url": "http://a/1", "capsfusion": "Spiked silver earrings.",
        "laion_2b": "EARRINGS SPIKE", "laion_coco": "silver earrings",
    },
    "relaion": {
        "URL": "http://a/1", "TEXT": "earrings", "WIDTH": 560, "HEIGHT": 840, "similarity": 0.25,
        "hash": -4163, "punsafe": 0.125, "pwatermark": 0.5, "LANGUAGE": "en",
    },
    "laion_coco": {
        "URL": "http://a/1", "TEXT": "EARRINGS SPIKE", "top_caption": "silver earrings",
        "all_captions": ["silver earrings", "earrings"], "all_similarities": [0.3, 0.2],
        "WIDTH": 560, "HEIGHT": 840, "similarity": 0.25, "hash": -4163, "pwatermark": 0.5,
        "punsafe": 0.125,
    },
}  # fmt: skip
"""A row of every list, as published."""
SCORES = {
    "datacomp": (0.25, None, None), "recap_datacomp": (0.25, None, None),
    "pixelprose": (None, None, 0.125), "capsfusion": (None, None, None),
    "relaion": (0.25, 0.125, 0.5), "laion_coco": (0.25, 0.125, 0.5),
}  # fmt: skip
"""Similarity, punsafe and pwatermark of the row."""


def downloaded(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files and metadata of the row's image, fetched with the options of `download_options`."""
    published, row = SETS[name], LISTS[name]
    caption = row[published.captions[0]]
    columns = json.loads(published.download_options().split("'")[1])
    meta = img2dataset_meta("000000000", caption, url=row[published.url])
    del meta["similarity"], meta["NSFW"], meta["LICENSE"]
    meta |= {column: row[column] for column in columns}
    files = {"jpg": jpeg(1, (80, 60)), "txt": caption.encode(), "json": json.dumps(meta).encode()}
    return files, meta


@pytest.mark.parametrize("name", SETS)
def test_columns_of_a_list(name: str, tmp_path: Path) -> None:
    """The list is recognised; images in it, or fetched for it, have its captions and scores."""
    published, row = SETS[name], LISTS[name]
    assert recognised(row.keys()) is published
    table = tmp_path / "list" / "part.parquet"
    table.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), table)
    (reject,) = read_all(list(READERS[name].chunks(Source(str(table.parent)))))
    assert isinstance(reject, Reject)
    assert f"a list of URLs of {published.title}, without images" in reject.detail
    assert f"--url_col {published.url} --caption_col {published.captions[0]} " in reject.detail
    files, meta = downloaded(name)
    write_tar(tmp_path / "tars" / "00000.tar", members(("000000000", files)))
    write_img2dataset_parquet(tmp_path / "parquet" / "0.parquet", [("000000000", files, meta)])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row | {"image": files["jpg"]}]), tmp_path / "images.parquet"
    )
    for place in ("tars", "parquet", "images.parquet"):
        (pair,) = pairs(
            read_all(list(READERS[name].chunks(Source(str(tmp_path / place)))))
        ).values()
        assert (pair.similarity, pair.punsafe, pair.pwatermark) == SCORES[name], place
        assert pair.url == "http://a/1" and pair.image == files["jpg"]
        first = (
            "TEXT" if (name, place) == ("laion_coco", "images.parquet") else published.captions[0]
        )
        assert pair.captions == row[first], place
    for column in published.captions[1:]:
        source = Source(str(tmp_path / "tars"), caption_key=column)
        (pair,) = pairs(read_all(list(READERS[name].chunks(source)))).values()
        texts = row[column] if isinstance(row[column], list) else [row[column]]
        assert pair.captions == [RoleText(column, text) for text in texts]


@pytest.mark.parametrize(("kind", "score", "expected"), [(0, 0.75, 0.75), (2, 0.75, 0.25)])
def test_watermark_classes_of_pixelprose(kind: int, score: float, expected: float) -> None:
    fields = LISTS["pixelprose"] | {"watermark_class_id": kind, "watermark_class_score": score}

    assert pair_of("a", b"", "a", fields).pwatermark == expected


PAIR = RawPair("a", jpeg(1), "a dog", similarity=0.25, punsafe=0.5, pwatermark=0.125)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_similarity": 0.25, "max_punsafe": 0.5, "max_pwatermark": 0.125}, None),
        ({"min_similarity": 0.26}, Reason.LOW_SIMILARITY),
        ({"max_punsafe": 0.49}, Reason.UNSAFE),
        ({"max_pwatermark": 0.1}, Reason.WATERMARK),
        ({"max_pwatermark": 0.0}, Reason.WATERMARK),
    ],
)
def test_limits_of_scores(limits: dict[str, float], reason: Reason | None) -> None:
    record, rejects, _ = screen(PAIR, Rules("", min_side=1, **limits))  # type: ignore[arg-type]
    assert [reject.reason for reject in rejects] == ([] if reason is None else [reason])
    assert (record is None) == (reason is not None)
    unscored = RawPair("a", jpeg(1), "a dog", note="keys: text")
    record, rejects, _ = screen(unscored, Rules("", min_side=1, **limits))  # type: ignore[arg-type]
    assert record is None and rejects[0].reason == Reason.MISSING_SCORE
    assert rejects[0].detail.endswith("; keys: text")
    rules = Rules("", min_side=1, keep_unscored=True, **limits)  # type: ignore[arg-type]
    assert screen(unscored, rules)[0] is not None


def test_filters_of_a_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = []
    for number, scores in enumerate(
        ({"similarity": 0.3, "punsafe": 0.1}, {"similarity": 0.2, "punsafe": 0.1},
         {"similarity": 0.3, "punsafe": 0.9}, {"similarity": 0.3})
    ):  # fmt: skip
        files = {
            "jpg": jpeg(number, (80, 60)),
            "txt": b"a dog",
            "json": json.dumps(scores).encode(),
        }
        samples.append((f"00000000{number}", files))
    write_tar(tmp_path / "in" / "00000.tar", members(*samples))

    def convert(out: str, *options: str) -> int:
        places = [str(tmp_path / "in"), str(tmp_path / out)]
        limits = ["--min-similarity", "0.25", "--max-punsafe", "0.5"]
        tokens = ["--workers", "1", "--tokenizer", "/nowhere"]
        return prepare_data.main(["relaion", *places, *limits, *tokens, *options])

    assert convert("out") == 0
    output = capsys.readouterr().out
    assert "pairs: 4 read = 1 written + 3 rejected" in output
    for line in ("similarity too low: 1", "punsafe too high: 1", "missing score: 1"):
        assert f"  {line}\n" in output
    (shard,) = read_index(tmp_path / "out")
    assert [shard.read(i)["id"] for i in range(shard.samples)] == ["000000000"]
    assert convert("kept", "--keep-unscored") == 0
    assert "4 read = 2 written + 2 rejected" in capsys.readouterr().out
    assert convert("out", "--max-pwatermark", "0.5") == 2
    assert "max_pwatermark was None and is 0.5" in capsys.readouterr().err
    assert convert("none", "--max-pwatermark", "0.5") == 2
    message = capsys.readouterr().err
    assert "no pair can be written; missing score: 000000000: no pwatermark; files: jpg" in message
    assert "--keep-unscored" in message
    assert convert("wrong", "--max-pwatermark", "50") == 2
    assert "--max-pwatermark 50.0: expected a number from 0 to 1" in capsys.readouterr().err


def test_the_docs_tell_the_options_of_img2dataset() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    missing = [name for name in SETS if SETS[name].download_options() not in page]
    assert not missing
