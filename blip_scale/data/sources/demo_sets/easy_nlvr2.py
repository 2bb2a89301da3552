"""A small synthetic NLVR2 set, made from easy-VQA's drawings.

Each drawing shows one shape in one colour. Both follow from easy-VQA's questions about it. Two
drawings of different colours make a pair with four sentences, of which two are false:

    the left picture shows a red shape         false with the colour of the other drawing
    one of the pictures shows a red shape      false with a colour of neither drawing

The side (left or right) is random. The text alone gives no hint, because every colour is true as
often as false.

The set `drawings` is for pretraining. It has the training drawings, each with one caption ("the
picture shows a red circle"). `text` is a small BERT whose vocabulary covers all the words.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blip_scale.data.shards import Record, write_shards
from blip_scale.data.sources.demo_sets import easy_vqa
from blip_scale.data.sources.demo_sets.demo import SHARD_SIZE, TEXT_CHECKPOINT
from blip_scale.data.sources.demo_sets.small_bert import write_small_bert

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
PAIRS_PER_DRAWING = {"train": 2, "test": 1}
"""Split -> number of pairs that have a given drawing on the left."""


def prepare(folder: Path) -> dict[str, int]:
    """Make the sets `drawings`, `train` and `test` in a new folder.

    Returns:
        Name of a set -> its number of drawings or pairs.

    Raises:
        FileExistsError: the folder exists.
        ModuleNotFoundError: a package of requirements-demo.txt is missing.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written = {}
    for split, drawings in easy_vqa.drawings().items():
        named = [drawing for drawing in drawings if thing(drawing)]
        paired = pairs(named, PAIRS_PER_DRAWING[split])
        written[split] = write_shards(partial / split, paired, SHARD_SIZE)
        if split == "train":
            single = [captioned(drawing) for drawing in named]
            written["drawings"] = write_shards(partial / "drawings", single, SHARD_SIZE)
            texts = [text for record in [*single, *paired] for text in record.captions]
            write_small_bert(partial / "text", TEXT_CHECKPOINT, texts)
    partial.rename(folder)
    return written


def thing(drawing: Record) -> str:
    """Describe a drawing of easy-VQA, such as "a red circle".

    Return "" if its questions do not determine both shape and colour.
    """
    told = set()
    for question, annotation in zip(drawing.captions, drawing.annotations or (), strict=True):
        if question.startswith("what"):
            told |= {*question.rstrip("?").split(), *annotation["answers"]}
    shape, color = told.intersection(SHAPES), told.intersection(COLORS)
    return f"a {color.pop()} {shape.pop()}" if shape and color else ""


def captioned(drawing: Record) -> Record:
    """Replace the questions of a drawing by a caption."""
    caption = f"the picture shows {thing(drawing)}"
    return replace(drawing, caption=caption, annotations=None)


def pairs(drawings: Sequence[Record], each: int) -> list[Record]:
    """Make NLVR2 records. Each drawing is `each` times on the left, beside another colour."""
    rng = random.Random(f"pairs of {len(drawings)}")
    colors = {drawing.id: thing(drawing).split()[1] for drawing in drawings}
    records = []
    for turn in range(each):
        for left in drawings:
            others = [other for other in drawings if colors[other.id] != colors[left.id]]
            right = rng.choice(others)
            shown = [colors[left.id], colors[right.id]]
            place = rng.randrange(2)
            neither = rng.choice([color for color in COLORS if color not in shown])
            side = ("left", "right")[place]
            records.append(
                replace(
                    left,
                    id=f"{left.id} {right.id} {turn}",
                    caption=[
                        f"the {side} picture shows a {shown[place]} shape",
                        f"the {side} picture shows a {shown[1 - place]} shape",
                        f"one of the pictures shows a {shown[place]} shape",
                        f"one of the pictures shows a {neither} shape",
                    ],
                    annotations=[{"label": label} for label in (True, False, True, False)],
                    second_image=right.image,
                )
            )
    return records
