"""A small synthetic VisDial set, made from the demo's drawings and their names.

Each drawing has a dialog of two rounds. Each round has 100 candidate answers: "yes", "no" and
names. The first question is "is it X?", where X is the correct name half of the time. The second
question is "what does it show?". If the first answer is "yes", the history contains the second
answer.

The training set uses the drawings of the demo's stream `emoji`. The test set uses those of
`heldout_drawing`, which no demo run has seen.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip_scale.data.shards import Record, read_index, write_shards
from blip_scale.data.sources.demo_sets.demo import SHARD_SIZE

SPLITS = {"train": "emoji", "test": "heldout_drawing"}
CANDIDATES = 100


def prepare(demo: Path, folder: Path) -> dict[str, int]:
    """Make the sets `train` and `test` in `folder` from a demo set.

    Returns:
        Name of a set -> its number of drawings.

    Raises:
        FileExistsError: the folder exists.
        FileNotFoundError: there is no demo set.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written = {
        split: write_shards(partial / split, dialogs(_drawings(demo / stream)), SHARD_SIZE)
        for split, stream in SPLITS.items()
    }
    partial.rename(folder)
    return written


def _drawings(folder: Path) -> list[Record]:
    """Read the drawings in a folder, each with its name as caption."""
    records = []
    for shard in read_index(folder):
        for number in range(shard.samples):
            sample = shard.read(number)
            records.append(
                Record(sample["id"], sample["image"], sample["captions"][0], sample["source"])
            )
    return records


def dialogs(drawings: Sequence[Record]) -> list[Record]:
    """Make one VisDial record per drawing."""
    rng = random.Random(f"dialogs of {len(drawings)}")
    records = []
    for drawing in drawings:
        name = drawing.captions[0]
        others = [other.captions[0] for other in _others(drawing, drawings, CANDIDATES - 2, rng)]
        is_right = rng.random() < 0.5
        asked = [f"is it {name if is_right else others[0]}", "what does it show"]
        answers = ["yes" if is_right else "no", name]
        rounds = [_round([], ["yes", "no", *others], answers[0], rng)]
        history = [[asked[0], answers[0]]]
        rounds.append(_round(history, [name, "no", *others], answers[1], rng))
        records.append(replace(drawing, caption=asked, annotations=rounds))
    return records


def _round(
    history: list[list[str]], candidates: list[str], answer: str, rng: random.Random
) -> dict[str, Any]:
    rng.shuffle(candidates)
    return {
        "caption": "a drawing",
        "history": history,
        "candidates": candidates,
        "answer": candidates.index(answer),
    }


def _others(
    drawing: Record, drawings: Sequence[Record], count: int, rng: random.Random
) -> list[Record]:
    """Draw `count` drawings with names that differ from each other and from this drawing's."""
    names = {drawing.captions[0]}
    others: list[Record] = []
    while len(others) < count:
        other = rng.choice(drawings)
        if other.captions[0] not in names:
            names.add(other.captions[0])
            others.append(other)
    return others
