"""easy-VQA: 5,000 drawings of one shape each, and 48,000 questions about them with 13 answers.

The Python package easy-vqa ships the data (Zhou, 2019; MIT licence), split into train and test.

The folder of the sets `train` and `test` also holds `answer_list.json`, the candidate answers, and
`text`, a small BERT with the word pieces of the questions.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from blip_scale.data.shards import Record, write_shards
from blip_scale.data.sources.demo_sets.demo import SHARD_SIZE, TEXT_CHECKPOINT
from blip_scale.data.sources.demo_sets.small_bert import write_small_bert

_SOURCE = "easy_vqa"

Questions = tuple[Sequence[str], Sequence[str], Sequence[int]]
"""Questions, their answers, and the numbers of their images."""


def prepare(folder: Path) -> dict[str, int]:
    """Make the sets in a new folder.

    Returns:
        Name of a set -> its number of questions.

    Raises:
        FileExistsError: the folder exists.
        ModuleNotFoundError: a package of requirements-demo.txt is missing.
    """
    import easy_vqa

    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another folder")
    train, test = easy_vqa.get_train_questions(), easy_vqa.get_test_questions()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split, drawn in drawings().items():
        write_shards(partial / split, drawn, SHARD_SIZE)
    answers = sorted(set(train[1]))
    (partial / "answer_list.json").write_text(json.dumps(answers) + "\n")
    write_small_bert(partial / "text", TEXT_CHECKPOINT, [*train[0], *answers])
    partial.rename(folder)
    return {"train": len(train[0]), "test": len(test[0])}


def drawings() -> dict[str, list[Record]]:
    """Return the records of both splits."""
    import easy_vqa

    train, test = easy_vqa.get_train_questions(), easy_vqa.get_test_questions()
    return {
        "train": records("train", train, easy_vqa.get_train_image_paths()),
        "test": records("test", test, easy_vqa.get_test_image_paths()),
    }


def records(split: str, questions: Questions, images: Mapping[int, str]) -> list[Record]:
    """Make one record per image, with all its questions."""
    asked: dict[int, list[int]] = defaultdict(list)
    for number, image in enumerate(questions[2]):
        asked[image].append(number)
    made = []
    for image, numbers in sorted(asked.items()):
        annotations = [{"answers": [questions[1][n]], "question_id": n} for n in numbers]
        made.append(
            Record(
                f"{split}/{image}.png",
                Path(images[image]).read_bytes(),
                [questions[0][number] for number in numbers],
                _SOURCE,
                annotations=annotations,
            )
        )
    return made


def majority(train: Questions, test: Questions) -> float:
    """Return the test accuracy of a baseline that ignores the images.

    It answers each question with its most frequent answer in training.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, _ in zip(*train, strict=True):
        counts[question][answer] += 1
    usual = Counter(train[1]).most_common(1)[0][0]
    right = [
        (counts[question].most_common(1)[0][0] if question in counts else usual) == answer
        for question, answer, _ in zip(*test, strict=True)
    ]
    return sum(right) / len(right)
