"""tools/evaluate.py on a list whose images lie in a bucket gives the same figures as on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_blip
import tiny_runs
from s3_server import S3Server

from blip_scale.commands import evaluate

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]


def report(out: Path, *arguments: str) -> dict[str, Any]:
    assert evaluate.main(["retrieval", *arguments, "--json", str(out), "--overwrite"]) == 0
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def test_lists_and_images_in_a_bucket(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures are equal, and missing images are counted before anything is measured."""
    words = tiny_blip.vocabulary(tmp_path / "vocabulary")
    ours = str(tiny_blip.write_ours(tmp_path / "step_00000007", tiny_blip.config(words), words))
    folder = tmp_path / "set"
    folder.mkdir()
    items = []
    for record in tiny_runs.records("p")[::6]:
        name = f"{record.id}.png"
        (folder / name).write_bytes(record.image)
        items.append({"image": name, "caption": record.captions[0]})
    (folder / "list.json").write_text(json.dumps(items))
    remote = s3.upload(folder)
    out = tmp_path / "report.json"
    here = report(out, ours, str(folder / "list.json"))
    there = report(out, ours, f"{remote}/list.json")
    assert there["figures"] == here["figures"] and there["images"] == len(items) > 8
    apart = report(out, ours, str(folder / "list.json"), "--images", remote)
    assert apart["figures"] == here["figures"]

    items += [{"image": f"no{number}.png", "caption": "a"} for number in range(2)]
    (folder / "list.json").write_text(json.dumps(items))
    arguments = ["retrieval", ours, str(folder / "list.json"), "--images", remote]
    assert evaluate.main(arguments) == 2
    message = capsys.readouterr().err
    assert f"2 images are missing, the first: {remote}/no0.png" in message
    assert evaluate.main(["retrieval", ours, f"{remote}/nothing.json"]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
