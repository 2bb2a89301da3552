"""Test files to which each step appends lines, and the record of the samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from fake_ranks import FakeRanks

from blip_scale.engine.watching.sample_record import SampleRecord
from blip_scale.storage import files


def steps(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("last", "expected"), [(9, [1, 2, 2, 10]), (2, [1, 2, 2]), (0, [])])
def test_lines_past_a_step_are_taken_back(tmp_path: Path, last: int, expected: list[int]) -> None:
    file = tmp_path / "lines.jsonl"
    files.take_back(file, 5)  # the file does not exist yet
    for step in (1, 2, 2, 10):
        files.add_line(file, step, {"ids": ["a", "größer"]})
    with file.open("a") as stream:
        stream.write('{"step": 2, "ids": ["torn')
    files.take_back(file, last + (last == 9))
    assert steps(file) == expected


def test_every_step_is_one_line_in_the_order_read(tmp_path: Path) -> None:
    record = SampleRecord(tmp_path, 0, enabled=True)
    record.add(1, ["b", "a"])
    record.add(2, ["c", 'quote"'])
    lines = (tmp_path / "samples" / "rank_0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "ids": ["b", "a"]},
        {"step": 2, "ids": ["c", 'quote"']},
    ]


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    SampleRecord(tmp_path, 0, enabled=False).add(1, ["a"])
    assert not list(tmp_path.iterdir())


def test_fewer_ranks_take_back_the_lines_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(ranks: int, begin: int, end: int) -> None:
        def one(rank: int) -> None:
            record = SampleRecord(tmp_path, begin, enabled=True)
            for step in range(begin + 1, end + 1):
                record.add(step, [f"{step}/{rank}"])

        with monkeypatch.context() as patches:
            FakeRanks(ranks, patches).run(one)

    train(4, 0, 5)
    train(2, 3, 6)
    folder = tmp_path / "samples"
    assert [steps(folder / f"rank_{rank}.jsonl") for rank in range(4)] == [
        [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 3],
    ]  # fmt: skip


def test_a_disk_that_fails_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "samples").write_text("no folder")
    record = SampleRecord(tmp_path, 0, enabled=True)
    record.add(1, ["a"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "record of the samples" in caplog.messages[0]
