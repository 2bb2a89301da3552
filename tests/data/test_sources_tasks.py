"""VQA, NLVR2 and VisDial from published forms to batches, and their refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import jpeg, stream, take

from blip_scale.config.recipe import DataRecipe
from blip_scale.data.captions import clean_question
from blip_scale.data.conversion.pairs import Source
from blip_scale.data.conversion.run import Conversion, Part, convert
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.heldout.pairs import heldout_pairs
from blip_scale.data.loading.loader import TrainLoader
from blip_scale.data.loading.micro_batches import CaptionInput, LoaderPosition
from blip_scale.data.pixels.image_pairs import maybe_swap
from blip_scale.data.shards import Record
from blip_scale.data.sources.demo_sets import easy_nlvr2
from blip_scale.data.sources.readers import READERS

Convert = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def converted(tmp_path: Path) -> Convert:
    """Function that converts a task's annotations with images 0.jpg to 5.jpg to shards.

    It returns the shards and the summary.
    """
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, (40, 40)))

    def run(
        task: str, content: Any, images: str = "", **options: str
    ) -> tuple[Path, dict[str, Any]]:
        (tmp_path / f"{task}.json").write_text(json.dumps(content))
        source = Source(str(tmp_path / f"{task}.json"), images)
        chunks = list(READERS[task].chunks(source, **options))
        out = tmp_path / f"{task}_shards"
        summary = convert(Conversion(chunks, str(out), Rules(task, max_words=50)), Part())
        assert summary is not None
        return out, summary

    return run


def test_questions(converted: Convert, text: CaptionInput) -> None:
    """Questions are grouped by image, cleaned, and read once an epoch with their answers."""
    items = [
        {"question": "What's (this)?", "answer": ["a cat"] * 7 + ["cat"] * 3, "image": "0.jpg",
         "dataset": "vqa", "question_id": 7},
        {"question": "Red or blue: which?", "answer": "red", "image": "0.jpg", "dataset": "vg"},
        {"question": "How many?", "answer": ["2"], "image": "1.jpg", "dataset": "vqa"},
        {"question": "Who?", "answer": [], "image": "1.jpg"},
        {"question": "Who?", "image": "1.jpg", "question_id": 8},
        {"question": "Who?", "answer": ["a dog"], "image": "9.jpg"},
        {"question": "Who?", "answer": ["a dog"]},
        {"answer": ["a dog"], "image": "1.jpg"},
    ]  # fmt: skip
    folder, summary = converted("vqa", items)
    assert summary["pairs"]["written"] == 2
    assert summary["captions"]["written"] == 3
    assert summary["rejects"] == {
        "bad annotation": 2, "missing caption": 1, "missing image": 1, "missing key": 1,
    }  # fmt: skip
    pairs = heldout_pairs(stream(folder), 16, clean=clean_question, max_words=50)
    assert pairs.captions == [["what's this?", "red or blue which?"], ["how many?"]]
    assert pairs.annotations[0][1] == {"answers": ["red"], "dataset": "vg"}
    data = DataRecipe(streams=[stream(folder, repeat="captions")], workers=0)
    questions = CaptionInput(text.tokenizer, 8, 50, clean_question)
    loader = TrainLoader(data, 16, questions, 1, LoaderPosition(0, 1, 3, 3))
    (batch,) = take(loader, 1)
    annotations = dict(zip(batch.captions, batch.annotations, strict=True))
    assert annotations["how many?"]["answers"] == ["2"]
    assert annotations["what's this?"]["question_id"] == 7
    assert len(annotations) == 3


def test_a_test_split_has_no_answers(converted: Convert) -> None:
    items = [
        {"question": "Who?", "image": "0.jpg", "question_id": 3, "dataset": "vqa"},
        {"question": "Who?", "image": "0.jpg"},
    ]
    folder, summary = converted("vqa", items)
    assert summary["rejects"] == {"bad annotation": 1}
    assert heldout_pairs(stream(folder), 16).annotations == [[{"question_id": 3, "dataset": "vqa"}]]


def test_pairs_of_images(converted: Convert, text: CaptionInput) -> None:
    items = [
        {"images": ["0.jpg", "1.jpg"], "sentence": "The left one is a hund.", "label": "True"},
        {"images": ["0.jpg", "1.jpg"], "sentence": "Both are ein pair", "label": "False"},
        {"images": ["2.jpg"], "sentence": "x", "label": "True"},
        {"images": ["2.jpg", "3.jpg"], "sentence": "x", "label": "perhaps"},
        {"images": ["2.jpg", "9.jpg"], "sentence": "x", "label": "True"},
        {"images": ["2.jpg", "3.jpg"], "sentence": "x"},
    ]
    folder, summary = converted("nlvr2", items)
    assert summary["rejects"] == {"bad annotation": 2, "missing image": 1, "missing key": 1}
    pairs = heldout_pairs(stream(folder), 16)
    (images,) = pairs.images([0])
    assert images.shape == (2, 3, 16, 16) and not torch.equal(images[0], images[1])
    assert pairs.annotations == [[{"label": True}, {"label": False}]]
    data = DataRecipe(
        streams=[stream(folder, repeat="captions")], workers=0, flip=False, augment=False
    )
    loader = TrainLoader(data, 16, text, 1, LoaderPosition(0, 1, 2, 2))
    batches = take(loader, 8)
    assert all(batch.images.shape == (2, 2, 3, 16, 16) for batch in batches)
    sentences = {caption for batch in batches for caption in batch.captions if "hund" in caption}
    assert sentences == {"the left one is a hund", "the right one is a hund"}, (
        "swapped half the time"
    )


def test_a_swap_takes_the_words_with_it() -> None:
    import numpy as np

    images = torch.arange(2).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    seen = set()
    for seed in range(20):
        swapped, sentence = maybe_swap(images, "left of leftovers", np.random.default_rng(seed))
        seen.add((int(swapped[0, 0, 0, 0]), sentence))
    assert seen == {(0, "left of leftovers"), (1, "right of leftovers")}


def test_dialogs(converted: Convert, tmp_path: Path) -> None:
    """Images are named by the number at the end of their file; relevances are added."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "VisualDialog_val2018_000000000042.jpg").write_bytes(jpeg(1, (40, 40)))
    turns = [
        {"question": 0, "answer": 1, "answer_options": [0, 1, 2], "gt_index": 1},
        {"question": 1, "answer": 2, "answer_options": [2, 1, 0], "gt_index": 0},
    ]
    dialogs = [
        {"image_id": 42, "caption": "A cat.", "dialog": turns},
        {"image_id": 43, "caption": "A dog.", "dialog": turns},
        {"image_id": 42, "caption": "A cat.", "dialog": [turns[0] | {"gt_index": 3}]},
        {"image_id": 42, "caption": "A cat.", "dialog": [{"question": 0, "answer_options": [0]}]},
    ]
    content = {
        "version": "1.0", "split": "val",
        "data": {"dialogs": dialogs, "questions": ["is it: big", "why"],
                 "answers": ["yes", "no", "maybe"]},
    }  # fmt: skip
    dense = [{"image_id": 42, "round_id": 2, "gt_relevance": [1.0, 0.4, 0.0]}]
    (tmp_path / "dense.json").write_text(json.dumps(dense))
    folder, summary = converted(
        "visdial", content, images=str(tmp_path / "photos"), relevance=str(tmp_path / "dense.json")
    )
    assert summary["rejects"] == {"bad annotation": 1, "missing image": 1, "missing key": 1}
    pairs = heldout_pairs(stream(folder), 16, clean=clean_question)
    assert pairs.captions == [["is it big", "why"]]
    first, second = pairs.annotations[0]
    assert first == {
        "caption": "A cat.", "history": [], "candidates": ["yes", "no", "maybe"], "answer": 1,
    }  # fmt: skip
    assert second["history"] == [["is it: big", "no"]]
    assert second["candidates"][second["answer"]] == "maybe"
    assert second["relevance"] == [1.0, 0.4, 0.0]


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "visdial"])
def test_another_file(converted: Convert, task: str) -> None:
    with pytest.raises(ValueError, match=f"{task}.json (holds no list of|is not a VisDial file)"):
        converted(task, {"images": []})


def drawing(number: int, told: list[tuple[str, str]]) -> Record:
    return Record(
        f"train/{number}.png",
        bytes([number]),
        [question for question, _ in told],
        "easy_vqa",
        annotations=[{"answers": [answer]} for _, answer in told],
    )


def test_what_a_drawing_of_easy_vqa_shows() -> None:
    """Only questions with "what" count: others may name absent things."""
    answers = [
        ("is there a teal shape?", "no"), ("what is the blue shape?", "circle"),
        ("is no triangle present?", "yes"),
    ]  # fmt: skip
    assert easy_nlvr2.thing(drawing(0, answers)) == "a blue circle"
    assert easy_nlvr2.thing(drawing(0, [("is there a red circle?", "yes")])) == ""
    assert easy_nlvr2.thing(drawing(0, [("what color is the shape?", "red")])) == ""


def test_pairs_of_easy_vqa_drawings() -> None:
    """Every label follows from the content of the two drawings."""
    shown = {bytes([i]): f"a {color} shape" for i, color in enumerate(easy_nlvr2.COLORS)}
    drawings = []
    for i, color in enumerate(easy_nlvr2.COLORS):
        drawings.append(drawing(i, [(f"what is the {color} shape?", "circle")]))
    pairs = easy_nlvr2.pairs(drawings, each=5)
    assert len(pairs) == 5 * len(drawings) and len({pair.id for pair in pairs}) > 20
    sides = set()
    for pair in pairs:
        assert pair.second_image is not None
        both = {"left": shown[pair.image], "right": shown[pair.second_image]}
        assert both["left"] != both["right"]
        labels = [annotation["label"] for annotation in pair.annotations]
        assert labels == [True, False, True, False]
        for sentence, label in zip(pair.captions, labels, strict=True):
            subject, thing = sentence.split(" shows ")
            there = [both[side] for side in ("left", "right") if side in subject]
            assert (thing in (there or both.values())) == label, sentence
            sides |= {subject}
    assert sides == {"the left picture", "the right picture", "one of the pictures"}


def test_an_easy_vqa_drawing_with_a_caption() -> None:
    pair = easy_nlvr2.captioned(drawing(7, [("what is the blue shape?", "circle")]))
    assert pair.captions == ["the picture shows a blue circle"]
    assert pair.annotations is None and pair.image == bytes([7])
