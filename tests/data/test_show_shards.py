"""`blip-scale show`: the table, the totals and the contact sheets, of honest and hostile shards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import jpeg
from PIL import Image

from blip_scale.commands.main import main
from blip_scale.commands.show_shards import main as show
from blip_scale.data.shards import Record, write_shards

REPO = Path(__file__).resolve().parents[2]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\nforged line"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """40 samples in several shards, one of them hostile, one without an image."""
    records = [
        Record(f"id{n}", jpeg(n, (60, 40)), [f"number {n}", "second"], "test") for n in range(38)
    ]
    records.append(Record(EVIL, jpeg(38, (60, 40)), EVIL, EVIL))
    records.append(Record("no image", b"<svg onload=alert(3)>", "a caption", "test"))
    write_shards(tmp_path / "mds", records, 20_000)
    return tmp_path / "mds"


def test_a_random_sample_and_the_totals(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("1", "1", "2"):
        assert main(["show", str(shards), "--count", "5", "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    header, *rows, totals = outputs[0].splitlines()
    assert header.split() == ["id", "size", "source", "captions"]
    assert len(rows) == 5
    for row in rows:
        number = re.match(r"id(\d+)", row)
        assert number and row.split(None, 3)[1:] == [
            "60x40", "test", f"number {number[1]} | second",
        ]  # fmt: skip
    count = len(json.loads((shards / "index.json").read_text())["shards"])
    assert count > 1
    assert re.search(rf": 40 samples in {count} shards, [\d.]+ MB, 78 captions$", totals)


def test_ids(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show([str(shards), "--ids", "id37", "id3"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["id3", "id37"] and len(rows) == 4
    assert show([str(shards), "--ids", "id3", "nobody"]) == 2
    output = capsys.readouterr()
    assert "id3" in output.out and output.err.endswith("no sample has the id nobody\n")


def test_hostile_texts_are_neither_obeyed_nor_markup(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.html"
    assert show([str(shards), "--count", "40", "--sheet", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 43, "a line a sample, whatever it holds"
    assert all(line.isprintable() for line in lines)
    page = sheet.read_text(encoding="utf-8")
    assert page.count('class="card"') == 40 and page.count("data:image/jpeg;base64,") == 39
    assert "can't be decoded" in page and "&lt;script&gt;" in page
    for tag in ("<script", "<svg", "<img src"):
        assert tag not in page
    assert "href=" not in page and page.count(' src="data:image/jpeg') == page.count(' src="')


def test_a_picture_of_the_sheet(shards: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    assert show([str(shards), "--count", "40", "--sheet", str(sheet)]) == 0
    with Image.open(sheet) as picture:
        assert picture.format == "PNG" and picture.width > 5 * 224 and picture.height > 8 * 224


def test_a_damaged_sample_has_a_line(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = min(shards.glob("*.mds"))
    data = bytearray(shard.read_bytes())
    data[4:12] = b"\xff" * 8
    shard.write_bytes(bytes(data))
    assert show([str(shards), "--count", "40"]) == 1
    printed = capsys.readouterr()
    out = printed.out
    assert f"{shard.name}[0]" in out and "can't be read" in out and "id37" in out
    assert "2 of 40 samples can't be read; " in printed.err and printed.err.count("\n") == 1
    assert f"{shard.name} is damaged ({len(data)} bytes with a wrong checksum)" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count 0: expected 1 or more"),
        (["--sheet", "x.gif"], "expected a name in .html or .png"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    shards: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show([str(shards), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert show([str(shards / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_script_of_a_clone(shards: Path) -> None:
    command = [sys.executable, str(REPO / "tools" / "show_shards.py"), str(shards)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "40 samples" in ended.stdout, ended.stderr
