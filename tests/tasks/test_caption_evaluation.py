"""Metrics of captions on the images of published annotation files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from blip_scale.data.captions import clean_question
from blip_scale.data.conversion.pairs import RawPair, Source
from blip_scale.data.heldout.listed import listed_pairs
from blip_scale.data.heldout.pairs import HeldoutPairs
from blip_scale.data.sources.readers import READERS
from blip_scale.tasks import captioning

NAMES = ["val2014/COCO_val2014_000000391895.jpg", "val2014/COCO_val2014_000000060623.jpg"]
TEXTS = [["A man, with a red helmet.", "A man rides!"], ["A young girl (smiling)."]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "val2014").mkdir(parents=True)
    for name, colour in zip(NAMES, ("red", "blue"), strict=True):
        (folder / name).write_bytes(tiny_runs.picture(colour, "disc", True))
    return folder


def opened(file: Path, annotations: Any, images: Path, **more: str) -> HeldoutPairs:
    """The held-out pairs that tools/evaluate.py reads from an annotation file."""
    file.write_text(json.dumps(annotations))
    chunks = READERS["coco"].chunks(Source(str(file), str(images)), **more)
    pairs = [pair for chunk in chunks for pair in chunk.read()]
    return listed_pairs(file.name, pairs, 32, str)


def karpathy() -> dict[str, Any]:
    entries = []
    for name, texts, split in zip(NAMES, TEXTS, ("test", "val"), strict=True):
        sentences = [{"raw": text} for text in texts]
        entry = {"filepath": "val2014", "filename": Path(name).name, "split": split}
        entries.append({**entry, "sentences": sentences})
    return {"images": entries}


def test_the_published_lists_keep_ids_and_texts(tmp_path: Path, images: Path) -> None:
    """Karpathy's file, the list of one split, and COCO's annotation file give unchanged texts."""
    items = [{"image": n, "caption": t} for n, t in zip(NAMES, TEXTS, strict=True)]
    coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for number, (name, texts) in enumerate(zip(NAMES, TEXTS, strict=True)):
        image = {"id": number, "file_name": name, "domain": "near-domain"}
        coco["images"].append(image)
        coco["annotations"] += [{"image_id": number, "caption": text} for text in texts]
    sets, ids = [], []
    for number, content in enumerate((karpathy(), items, coco)):
        file = tmp_path / f"{number}.json"
        sets.append(opened(file, content, images))
        ids.append(captioning.image_ids(sets[-1], str(file)))
    assert [pairs.captions for pairs in sets] == [TEXTS] * 3
    assert all(pairs.images([0, 1]).shape == (2, 3, 32, 32) for pairs in sets)
    assert not (sets[0].images([0]) == sets[0].images([1])).all()
    assert ids == [[391895, 60623], [391895, 60623], [0, 1]]
    test_split = opened(tmp_path / "split.json", karpathy(), images, split="test")
    assert test_split.captions == TEXTS[:1]


def test_nocaps_has_images_alone(tmp_path: Path, images: Path) -> None:
    items = [{"image": name, "img_id": 4000 + i} for i, name in enumerate(NAMES)]
    pairs = opened(tmp_path / "nocaps_test.json", items, images)
    assert pairs.captions == [[], []]
    assert captioning.image_ids(pairs, str(tmp_path / "nocaps_test.json")) == [4000, 4001]


def test_figures_by_domain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without Java
    captions = ["a man rides", "a cat", "a young girl"]
    references = [["a man rides"], ["a dog"], ["a young girl"]]
    annotations = [[{"domain": "in-domain"}], [{"domain": "out-domain"}], [{"domain": "in-domain"}]]
    figures = captioning.figures(captions, references, annotations)
    assert figures["in-domain/rouge_l"] == 1
    assert figures["out-domain/rouge_l"] < figures["rouge_l"] < 1
    assert "there is no java" in figures["without meteor"]
    with pytest.raises(ValueError, match="1 of 3 images have no reference caption"):
        captioning.figures(captions, [*references[:2], []])


def test_references_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "gt.json"
    annotations = [{"image_id": i, "caption": text} for i, text in ((5, "A."), (7, "B!"), (5, "C"))]
    file.write_text(json.dumps({"images": [], "annotations": annotations}))
    assert captioning.references_of(str(file), [7, 5]) == [["B!"], ["A.", "C"]]
    with pytest.raises(ValueError, match="no captions of 1 of 2 images, the first 6"):
        captioning.references_of(str(file), [5, 6])


def test_what_cannot_be_used_is_refused(tmp_path: Path, images: Path) -> None:
    (images / NAMES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images are missing, the first: .*60623.jpg"):
        opened(tmp_path / "a.json", karpathy(), images)
    with pytest.raises(ValueError, match=r"1 of 1 items can't be used, the first: b.json:0"):
        opened(tmp_path / "b.json", [{"caption": "x"}], images)
    with pytest.raises(ValueError, match="0 of 0 items"):
        opened(tmp_path / "c.json", [], images)


def test_vqa_lists_are_read_as_their_shards_are(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "vqa_val.json"
    file.write_text(
        json.dumps(
            [
                {"image": NAMES[0], "question": "Is it red?", "answer": ["yes"], "question_id": 1},
                {"image": NAMES[0], "question": "What is it?", "answer": ["a disc"]},
            ]
        )
    )
    chunks = READERS["vqa"].chunks(Source(str(file), str(images)))
    items = [pair for chunk in chunks for pair in chunk.read()]
    pairs = listed_pairs(file.name, items, 32, clean_question)
    assert pairs.captions == [["is it red?", "what is it?"]]
    assert [answer["answers"] for answer in pairs.annotations[0]] == [["yes"], ["a disc"]]


def test_the_annotation_of_a_missing_text_is_left_out_with_it(images: Path) -> None:
    place = str(images / NAMES[0])
    annotations = [{"answers": [answer]} for answer in ("yes", "a disc", "no")]
    pair = RawPair("1", place, ["is it red?", None, "is it big?"], annotations=annotations)
    pairs = listed_pairs("set", [pair], 32, clean_question)
    assert pairs.captions == [["is it red?", "is it big?"]]
    assert [answer["answers"] for answer in pairs.annotations[0]] == [["yes"], ["no"]]


def test_a_caption_that_is_no_text_is_refused_by_name(tmp_path: Path, images: Path) -> None:
    items = [{"image": NAMES[0], "caption": ["a man", 5]}]
    with pytest.raises(ValueError, match=f"list.json: {NAMES[0]}: a caption is not a string: 5"):
        opened(tmp_path / "list.json", items, images)
