"""`tools/plot_run.py`: what a run's folder holds, as one picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip_scale.config import recipe
from blip_scale.data.shards import Record, write_shards
from tools import plot_run

pytest.importorskip("matplotlib")

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
POINTS = [
    {"step": 20, "loss/itc": 2.0, "loss/itm": None, "loss/lm": 3.0},
    {"step": 10, "loss/itc": 5.0, "loss/itm": 0.7, "loss/lm": 9.0},
    {"step": 20, "colors/itc_image_to_text_r10": 0.5, "colors/candidates": 20.0},
]


def encoded(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a finished run with two held-out images."""
    records = [Record(name, encoded(color), name, "colors") for name, color in COLORS.items()]
    write_shards(tmp_path / "colors", records)
    folder = tmp_path / "run"
    folder.mkdir()
    heldout = f"data.heldout=[{{name: colors, local: {tmp_path / 'colors'}}}]"
    text = recipe.to_yaml(recipe.load("demo", [heldout]))
    (folder / "recipe.yaml").write_text(text)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in POINTS))
    captions = [
        {"set": "colors", "id": "blue", "caption": "b lue", "truth": "blue", "exact": True},
        {"set": "colors", "id": "red", "caption": "costs $5 or $6", "truth": "red"},
    ]
    (folder / "summary.json").write_text(json.dumps({"captions": captions}))
    return folder


def has_color(picture: Path, color: tuple[int, int, int]) -> bool:
    """Whether a hundred pixels have the color."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    return bool((pixels == color).all(-1).sum() > 100)


def test_curves_and_captioned_images(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "images" / "run.png"
    assert plot_run.main([str(run), str(picture)]) == 0
    assert all(has_color(picture, color) for color in COLORS.values())


def test_a_curve_is_in_order_and_skips_what_is_not_finite(run: Path) -> None:
    points = plot_run.read_points(run / "metrics.jsonl")
    assert plot_run.curve(points, "loss/itc") == ([10, 20], [5.0, 2.0])
    assert plot_run.curve(points, "loss/itm") == ([10], [0.7])


def test_an_image_is_that_of_its_caption(run: Path) -> None:
    settings = recipe.load(str(run / "recipe.yaml"))
    entries = json.loads((run / "summary.json").read_text())["captions"]
    blue, red = plot_run.captioned_images(settings, "colors", entries, 2)
    assert (blue.caption, tuple(blue.pixels[5, 5])) == ("b lue", COLORS["blue"])
    assert blue.is_exact and not red.is_exact
    assert (red.truth, tuple(red.pixels[5, 5])) == ("red", COLORS["red"])


def test_a_run_that_is_under_way_has_curves_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").unlink()
    assert plot_run.main([str(run), str(tmp_path / "run.svg")]) == 0
    assert "curves only" in capsys.readouterr().err
    assert "training losses" in (tmp_path / "run.svg").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.jsonl").write_text(""), "has logged nothing yet"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\nno\n"), "metrics.jsonl:2"),
        (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml"),
    ],
)
def test_a_folder_that_cannot_be_drawn_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, message: str
) -> None:
    damage(run)
    assert plot_run.main([str(run), str(tmp_path / "run.png")]) == 2
    assert message in capsys.readouterr().err


def test_sets_that_are_not_there_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot_run.main([str(run), str(tmp_path / "run.png"), "--set", "shapes"]) == 2
    assert "colors" in capsys.readouterr().err
    settings = recipe.load("demo", ["data.heldout=[]"])
    with pytest.raises(ValueError, match="no held-out set"):
        plot_run.set_of(settings, "")
