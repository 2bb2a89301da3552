"""Tiny runs of VQA, NLVR2 and VisDial on drawings.

They learn, their checkpoints are read and converted, and a set of another task is refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs

from blip_scale.commands import convert_checkpoint, evaluate
from blip_scale.data.shards import Record, write_shards
from blip_scale.interop.checkpoints import read_checkpoint

pytestmark = pytest.mark.multiprocess
STEPS = 8


def vqa_records() -> list[Record]:
    """Two questions about each drawing. People disagree about the first."""
    records = []
    for record in tiny_runs.records("vqa"):
        _, size, colour, shape, *_ = record.captions[0].split(" ")
        annotations = [
            {"answers": [colour] * 7 + [f"{size} {colour}"] * 3, "question_id": 1},
            {"answers": [shape]},
        ]
        questions = ["a grey and on", "a big and small on"]
        records.append(Record(record.id, record.image, questions, "vqa", annotations=annotations))
    return records


def nlvr2_records() -> list[Record]:
    """Pairs of drawings, each with a true and a false sentence."""
    drawings = tiny_runs.records("nlvr2")
    labels = [{"label": True}, {"label": False}]
    records = []
    for left, right in zip(drawings, drawings[9:] + drawings[:9], strict=True):
        true = f"{left.captions[0]} and {right.captions[0]}"
        false = f"{left.captions[0]} and {left.captions[0]}"
        record = Record(f"{left.id} {right.id}", left.image, [true, false], "nlvr2")
        records.append(replace(record, annotations=labels, second_image=right.image))
    return records


def visdial_records() -> list[Record]:
    """Dialogs of two rounds about each drawing. Only the second round has relevances."""
    drawings = tiny_runs.records("visdial")
    names = [drawing.captions[0] for drawing in drawings]
    records = []
    for n, drawing in enumerate(drawings):
        first = {"caption": "a", "history": [], "candidates": names[:12], "answer": n % 12}
        second = {
            "caption": "a",
            "history": [["a and", names[n % 12]]],
            "candidates": names[20:28],
            "answer": n % 8,
            "relevance": [float(i == n % 8) for i in range(8)],
        }
        record = Record(drawing.id, drawing.image, ["a and", "on a"], "visdial")
        records.append(replace(record, annotations=[first, second]))
    return records


RECORDS = {"vqa": vqa_records, "nlvr2": nlvr2_records, "visdial": visdial_records}


def make_recipe(folder: Path, task: str, steps: int = STEPS) -> Path:
    """Recipe of a task on its set. A quarter of the set is held out, too."""
    records = RECORDS[task]()
    write_shards(folder / task, records, shard_size="8kb")
    write_shards(folder / "few", records[::4])
    data = {
        "streams": [{"name": task, "local": str(folder / task), "repeat": "captions"}],
        "heldout": [{"name": "few", "local": str(folder / "few")}],
    }
    lengths = {"max_caption_tokens": 6, "min_caption_tokens": 1}
    return tiny_runs.make_recipe(
        folder,
        task=task,
        data=data,
        model={"text": {"max_tokens": 24}},
        train={"max_steps": steps},
        evaluation={"captions": 2, "batch_size": 8, "rerank_top_k": 3, **lengths},
    )


@pytest.mark.parametrize("task", RECORDS)
def test_a_run(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train on two ranks, whose batches hold different numbers of tokens, and convert the run."""
    recipe = make_recipe(tmp_path, task)
    if task == "vqa":
        answers = [*tiny_runs.COLOURS, *tiny_runs.SHAPES, "big red"]
        (tmp_path / "answers.json").write_text(json.dumps(answers))
    tiny_runs.train(recipe, 2)
    losses = [step["loss/total"] for step in tiny_runs.losses(tmp_path / "run").values()]
    assert len(losses) == STEPS
    if task == "nlvr2":  # takes more steps than these
        assert max(losses) < 1
    else:
        assert sum(losses[-3:]) < sum(losses[:3])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures = summary["evaluation"]
    assert figures["few/questions" if task != "nlvr2" else "few/sentences"] == 32
    main = {"vqa": "accuracy", "nlvr2": "accuracy", "visdial": "mrr"}[task]
    assert 0 <= figures[f"few/{main}"] <= 1
    assert ("few/ndcg" in figures) == (task == "visdial")
    run = tmp_path / "run"
    assert convert_checkpoint.main([str(run), str(tmp_path / "task.pth")]) == 0
    back = read_checkpoint(tmp_path / "task.pth")
    again = read_checkpoint(run, back.config)
    assert back.head == again.head == task
    assert all(again.state[name].equal(tensor) for name, tensor in back.state.items())
    measured = tmp_path / "figures.json"
    arguments = [
        task,
        str(tmp_path / "run"),
        str(tmp_path / "few"),
        "--json",
        str(measured),
        "--overwrite",
    ]
    assert evaluate.main(arguments) == 0
    evaluated = json.loads(measured.read_text())["figures"]
    assert evaluated[main] == pytest.approx(figures[f"few/{main}"], abs=1e-6)
    if task != "vqa":
        capsys.readouterr()
        assert convert_checkpoint.main([str(run), str(tmp_path / "hf")]) == 2
        assert "no such class; give OUT a name that ends in .pth" in capsys.readouterr().err
    else:
        listed = f"evaluation.answer_list={tmp_path / 'answers.json'}"
        submission = tmp_path / "submission.json"
        assert evaluate.main([*arguments, listed, "--submission", str(submission)]) == 2
        assert evaluate.main([*arguments, listed]) == 0
        assert convert_checkpoint.main([str(run), str(tmp_path / "hf")]) == 0
        assert read_checkpoint(tmp_path / "hf").head == "vqa"


@pytest.mark.parametrize("task", RECORDS)
def test_a_set_of_another_task(task: str, tmp_path: Path) -> None:
    """A set of another task is refused in one line that says how to make the right set."""
    recipe = make_recipe(tmp_path, task, steps=1)
    wrong = f"data.streams.0.local={tmp_path / 'shapes'}"
    ranks = tiny_runs.launch(recipe, 1, wrong, "data.streams.0.repeat=1")
    assert tiny_runs.finish(ranks) == [2]
    output = tiny_runs.said(recipe)
    assert {
        "vqa": "has no answers to",
        "nlvr2": "is not a pair of images with a label: make the set with",
        "visdial": "is not a dialog with candidates: make the set with",
    }[task] in output
