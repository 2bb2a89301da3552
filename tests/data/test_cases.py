"""Small inputs that were once converted wrongly: the output and rejects of each.

The inputs are in the folder `shared/cases` beside the checkout, whose README gives their origins.
Without that folder these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip_scale.commands import prepare_data
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.conversion.pairs import Source
from blip_scale.data.heldout.listed import listed_pairs
from blip_scale.data.heldout.videos import VideoSet, _frames_in
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.pixels.transforms import EvalTransform
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import read_index
from blip_scale.data.sources.readers import READERS
from blip_scale.tasks import captioning

_ABOVE = [folder / "shared" / "cases" for folder in Path(__file__).resolve().parents]
CASES = next((folder for folder in _ABOVE if folder.is_dir()), _ABOVE[-1])
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="there is no ../shared/cases")


@dataclass(frozen=True)
class Case:
    """An input with its expected output."""

    place: str
    reader: str
    written: dict[str, list[str]] = field(default_factory=dict)
    """Id -> captions."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Tuples (id, reason) of the rejects."""
    options: tuple[str, ...] = ()
    refused: str = ""
    """Part of the message that comes with exit code 2."""
    unused: dict[str, int] = field(default_factory=dict)


LATIN1 = ("captions.csv:3", "damaged input")
CASE_LIST = [
    Case("csv_crlf_bom_newline", "folder", {"0.jpg": ["a dog on a log"], "1.jpg": ["a cat"]}),
    Case("csv_dup_column", "folder", refused="captions.csv:1: the first line is 'image, caption"),
    Case("csv_latin1", "folder", {"0.jpg": ["a dog"]}, [LATIN1],
         unused={"images that no table names": 1}),
    Case("csv_latin1", "folder", {"0.jpg": ["a dog"], "1.jpg": ["un café"]},
         options=("--encoding", "latin-1")),
    Case("csv_list_captions", "folder", {"0.jpg": ["a dog", "a brown dog"]}),
    Case("csv_no_header", "folder", refused="or --columns image,caption for a table without"),
    Case("csv_no_header", "folder", {"0.jpg": ["a dog"], "1.jpg": ["a cat"]},
         options=("--columns", "image,caption")),
    Case("csv_spaces", "folder", {"0.jpg": ["a dog"]}),
    Case("csv_unquoted_commas", "folder", {"1.jpg": ["a dog"], "2.jpg": ["a cat, quoted"]},
         [("captions.csv:2", "damaged input")], unused={"images that no table names": 1}),
    Case("csv_utf16", "folder", {"0.jpg": ["a dog"]}),
    Case("tsv_open_quote", "folder", {
        "0.jpg": ["a red cat"], "1.jpg": ["quoted start never closed and more words"],
        "2.jpg": ["a blue dog"], "3.jpg": ["three birds"], "4.jpg": ["a middle quote"],
        "5.jpg": ["green hat"], "6.jpg": ["a ship"], "7.jpg": ["end"]}),
    Case("table_avif", "folder", {"d.avif": ["a b"]}),
    Case("hf_nested_metadata", "folder",
         {"train/0.png": ["train dog"], "test/0.png": ["test dog"]}),
    Case("folder_endings", "folder", {
        name: [f"caption {name[0]}"] for name in (
            "a.jpg", "b.JPG", "c.jpeg", "d.avif", "e.jfif", "f.heic", "g.jxl", "h.webp", "i.jpg",
            "i.png")},
        [("noext.txt", "missing image")], unused={"files without an ending": 1}),
    Case("all_bad", "folder", refused="no pair can be written; missing caption: a.jpg",
         rejected=[("a.jpg", "missing caption"), ("b.jpg", "missing caption")]),
    Case("wds_double_suffix", "webdataset", {f"a/s00{i}": [f"a dog {i}"] for i in range(3)}),
    Case("wds_duplicate_member", "webdataset", {"a/a": ["first"], "a/b": ["bee"]},
         [("a/a", "duplicate id"), ("a/b", "missing caption")]),
    Case("wds_endings", "webdataset", {
        "a/a": ["upper"], "a/b": ["jpeg"], "a/c": ["webp"], "a/d": ["avif"], "a/e": ["jfif"],
        "a/f": ["a json text"]}, unused={"files .cls": 1}),
    Case("wds_hardlinks", "webdataset", {"a/0": ["first"], "a/1": ["second"], "a/2": ["third"]}),
    Case("wds_json_shapes", "webdataset", {
        "a/a": ["one", "two"], "a/f": ["big text"], "a/g": ["alt"], "a/h": ["bc"], "a/i": ["ok"],
        "a/k": ["nan sim"]},
        [("a/b", "missing caption"), ("a/c", "caption is no text"), ("a/d", "missing caption"),
         ("a/e", "caption is no text"), ("a/j", "missing caption")]),
    Case("wds_latin1_names", "webdataset", {"a/ok": ["ok"], "a/z": ["zed"]},
         [("a/caf\udce9", "damaged input")]),
    Case("wds_nested_same_names", "webdataset", {"a/x/0": ["first"], "a/y/0": ["second"]}),
    Case("wds_not_adjacent", "webdataset", refused="sort the tar by name", rejected=[
        *((f"a/{i}", "missing caption") for i in range(3)),
        *((f"a/{i}", "missing image") for i in range(3))]),
    Case("wds_same_keys_two_runs", "webdataset", {
        f"{run}/00000/00000000{i}": [f"{run} {i}"] for run in ("cc12m", "cc3m") for i in range(3)}),
    Case("wds_same_keys_two_runs", "laion", {
        f"{run}/00000000{i}": [f"{run} {i}"] for run in ("cc12m", "cc3m") for i in range(3)}),
    Case("wds_tar_bz2", "webdataset", {"a/a": ["x dog"], "b/b": ["y dog"]}),
    Case("i2d_files", "laion", {"000000000": ["from json"]},
         [("000000001", "missing image"), ("000000002", "empty caption")]),
    Case("i2d_incomplete", "laion", {f"00000000{i}": [f"a {i}"] for i in range(3)},
         [("00001.tar", "damaged input"), ("00002.tar", "damaged input")]),
    Case("pq_alt_text", "laion", {"a/0": ["a dog"]}),
    Case("pq_base64", "laion", {"0": ["a dog"]}),
    Case("pq_bytes_caption", "laion", {"0": ["a dog"]}),
    Case("pq_datacomp_meta", "laion", refused="columns: uid, url, text, original_width",
         rejected=[("a.parquet", "missing key")]),
    Case("pq_dict_caps", "laion", {"0": ["a dog", "b"]}),
    Case("pq_empty_then_text", "laion", {"1": ["a dog from text"]}, [("2", "missing caption")]),
    Case("pq_hf_struct", "laion", {"0": ["a dog", "a brown dog"]},
         [("a/1", "outside the image folder")]),
    Case("pq_ids", "laion", {"1": ["a b"], "a/2": ["e f"]}, [("1", "duplicate id")]),
    Case("pq_laion_coco", "laion", {"a/0": ["a dog", "b dog"]},
         options=("--caption-key", "all_captions")),
    Case("pq_mixed", "laion", {"0": ["a dog"]}, [("b_meta.parquet", "missing key")]),
    Case("pq_nested", "laion", {"0": ["a", "b", "c"]}),
    Case("pq_paths", "laion", {"0": ["a dog"]}, unused={"files .jpg": 1}),
    Case("pq_row_per_caption", "laion", {"7": [f"caption {i}" for i in range(5)]}),
    Case("pq_types", "laion", {"0": ["a"], "1": ["b"], "2": ["c b"]}),
    Case("pq_zero_rows", "laion", refused="without rows (columns: jpg, caption)",
         unused={"parquet files without rows (columns: jpg, caption)": 1}),
    Case("windows_paths/list.json", "blip_json", {"train/0.jpg": ["a dog"]},
         [("C:/data/train/0.jpg", "missing image")]),
    Case("windows_paths/list.json", "blip_json", {"train/0.jpg": ["a dog", "a dog"]},
         options=("--strip-prefix", "C:\\data\\")),
    Case("windows_paths/s.json", "blip_json", refused="half a surrogate pair", rejected=[
        ("train/0.jpg", "caption is no text"), ("train/\ud83d.jpg", "damaged input")]),
    Case("windows_paths/s2.json", "blip_json", refused="its URL is no UTF-8",
         rejected=[("train/0.jpg", "damaged input")]),
    Case("windows_paths/list2.json", "blip_json", {"train/0.jpg": ["a dog one", "a dog two"]},
         [("/train/0.jpg", "outside the image folder")]),
    Case("windows_paths/b.json", "blip_json", {"train/0.jpg": ["bom"]}),
    Case("windows_paths/u.json", "blip_json", {"train/0.jpg": ["u16"]}),
    Case("windows_paths/lines.json", "blip_json", {"train/0.jpg": ["x", "y"]}),
    Case("windows_paths/d.json", "blip_json", refused="d.json holds no list of {image, caption}"),
    Case("windows_paths/e.json", "blip_json", refused="e.json is not JSON"),
    Case("windows_paths/l.json", "blip_json", refused="l.json: there is nothing to convert"),
    Case("coco_id_types/captions.json", "coco",
         {"0.jpg": ["a dog"], "1.jpg": ["a cat"], "2.jpg": ["a cow"]},
         [("captions.json: image_id 99", "missing image")]),
    Case("coco_instances/instances.json", "coco", refused="instances.json holds no captions but"),
    Case("flickr30k_token", "flickr30k", {"0.jpg": ["two young guys", "two friends"]}),
    Case("sbu_pair", "sbu", refused="is a URL, which is not fetched",
         rejected=[("a.jpg", "outside the image folder")]),
    Case("nocaps_test/nocaps_test_image_info.json", "coco", refused="missing caption: 0.jpg",
         rejected=[("0.jpg", "missing caption")]),
    Case("mds_foreign_bytes_json", "mds", {f"{i}": [f"a dog {i}"] for i in range(4)}),
    Case("mds_foreign_jpeg_str", "mds",
         {f"shard.00000.mds[{i}]": [f"a dog {i}"] for i in range(4)}),
]  # fmt: skip


def convert(reader: str, place: Path, out: Path, *options: str) -> int:
    tokens = ("--tokenizer", "/nowhere")  # a summary without counts of tokens
    return prepare_data.main([reader, str(place), str(out), "--workers", "1", *tokens, *options])


def captions_of(out: Path) -> dict[str, list[str]]:
    samples = [shard.read(i) for shard in read_index(out) for i in range(shard.samples)]
    return {sample["id"]: sample["captions"] for sample in samples}


def rejects_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASE_LIST, ids=lambda case: f"{case.place} {case.reader}")
def test_a_case(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = convert(case.reader, CASES / case.place, out, *case.options)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == (2 if case.refused else 0)
    assert case.refused in message
    if not (out / "index.json").exists():
        assert case.refused and not case.written
        return
    assert captions_of(out) == case.written
    rejects = rejects_of(out)
    assert sorted((line["id"], line["reason"]) for line in rejects) == sorted(case.rejected)
    for line in rejects:
        assert all(len(value) <= 200 for value in line.values() if isinstance(value, str))
    summary = json.loads((out / "summary.json").read_text())
    assert summary.get("tallies", {}) == case.unused
    for name in ("pairs", "captions"):
        counts = summary[name]
        assert counts["read"] == counts["written"] + counts["rejected"]


@pytest.mark.parametrize("name", ["wds_long_gnu", "wds_long_pax"])
def test_long_names_in_tars(name: str, tmp_path: Path) -> None:
    assert convert("webdataset", CASES / name, tmp_path / "out") == 0
    (captions,) = captions_of(tmp_path / "out").values()
    assert captions == ["пёс 🐶"]


def test_texts_that_mean_nothing_to_pandas(tmp_path: Path) -> None:
    """The texts "None" and "nan" are captions; white space is not."""
    assert convert("folder", CASES / "txt_none", tmp_path / "out") == 0
    captions = captions_of(tmp_path / "out")
    assert [captions[f"{i:02}.jpg"] for i in range(4)] == [["none"], ["nan"], ["null"], ["n/a"]]
    assert [line["id"] for line in rejects_of(tmp_path / "out")] == ["04.jpg", "05.jpg", "06.jpg"]


def test_a_test_set_without_captions() -> None:
    """`evaluate --submission` needs the ids of the images."""
    source = Source(str(CASES / "nocaps_test" / "nocaps_test_image_info.json"))
    items = [item for chunk in READERS["coco"].chunks(source) for item in chunk.read()]
    pairs = listed_pairs("nocaps", items, 32, images_below=source.image_root())
    assert pairs.captions == [[]] and pairs.images([0]).shape == (1, 3, 32, 32)
    assert captioning.image_ids(pairs, source.location) == [0]


ODD_REJECTS = (
    "eps.jpg", "html.jpg", "missing_eoi.jpg", "png_icc_3MB.png", "png_text_3MB.png", "psd.jpg",
    "svg.png", "truncated.jpg",
)  # fmt: skip


def test_odd_images(tmp_path: Path) -> None:
    """Many bits are scaled, transparency goes onto white, EXIF turns; the rest is rejected."""
    assert convert("folder", CASES / "images_odd", tmp_path / "out") == 0
    rejects = [(line["id"], line["reason"]) for line in rejects_of(tmp_path / "out")]
    assert sorted(rejects) == [(name, "undecodable") for name in ODD_REJECTS]
    images: dict[str, np.ndarray] = {}
    for shard in read_index(tmp_path / "out"):
        for number in range(shard.samples):
            sample = shard.read(number)
            images[sample["id"]] = np.asarray(decode_image(sample["image"]), dtype=np.float32)
    assert len(images) == 24
    for name in ("grey16.tif", "grey16.png", "float32.tif", "int32.tif"):
        assert 0 <= images[name].min() < 40 and 215 < images[name].max() <= 255, name
        assert np.abs(images[name] - images["grey16.tif"]).max() <= 1, name
    logo = images["logo_black_on_transparent.png"]
    assert logo.max() == 255 and logo.min() == 0 and logo.mean() > 128, "black on white"
    upright = {name for name in images if name.startswith("exif_rot_")}
    assert len(upright) == 5 and all(images[name].shape == (80, 60, 3) for name in upright)


def test_upright_on_every_route(tmp_path: Path) -> None:
    """Shards, `evaluate` on a list and `predict` see the same picture."""
    folder = CASES / "exif_three_ways"
    assert convert("blip_json", folder / "list.json", tmp_path / "out") == 0
    samples = [shard.read(i) for shard in read_index(tmp_path / "out") for i in range(2)]
    shapes = {s["id"]: decode_image(s["image"]).size for s in samples}
    assert shapes == {"rotated.jpg": (60, 80), "plain.jpg": (80, 60)}
    source = Source(str(folder / "list.json"))
    raw_pairs = [pair for chunk in READERS["blip_json"].chunks(source) for pair in chunk.read()]
    listed = listed_pairs("list", raw_pairs, 32, images_below=source.image_root())
    by_name = {sample["id"]: sample["image"] for sample in samples}
    for index, name in enumerate(("rotated.jpg", "plain.jpg")):
        transform = EvalTransform(32)
        in_shard = transform(decode_image(by_name[name])).float()
        asked = transform(decode_image((folder / name).read_bytes(), upright=True))
        evaluated = listed.images([index])[0]
        assert (evaluated - in_shard).abs().mean() < 4, "JPEG is written anew"
        assert torch.equal(evaluated, asked)


def test_lists_of_videos() -> None:
    folder = CASES / "video_shapes"
    videos = VideoSet(folder / "ok.jsonl", folder, 32)
    assert len(videos) == 1
    frames = [file.name for file in _frames_in(folder / "video1")]
    assert frames == [f"frame{number}.jpg" for number in range(1, 13)]
    for name in ("bom.jsonl", "blank.jsonl", "u2028.jsonl"):
        assert len(VideoSet(folder / name, folder, 32)) == 1
    for name in ("null.jsonl", "array.json", "videodatainfo.json", "MSRVTT_JSFUSION_test.csv"):
        with pytest.raises(ValueError, match=name):
            VideoSet(folder / name, folder, 32)


def test_shards_in_folders_below_the_index() -> None:
    store = StreamStore(StreamRecipe("set", str(CASES / "mds_multi_index")))
    assert [len(store.read(shard, 0)["captions"]) for shard in range(2)] == [1, 1]


def _other_list(folder: Path) -> tuple[str, ...]:
    path = folder / "l.json"
    path.write_text(path.read_text().replace("corrected", "rejected"))
    return ()


def _other_sidecar(folder: Path) -> tuple[str, ...]:
    path = folder / "0.txt"
    path.write_text(path.read_text()[::-1])
    return ()


def _add_images(folder: Path) -> tuple[str, ...]:
    shutil.copy(folder / "hidden.jpg", folder / "2.jpg")
    return ()


@pytest.mark.parametrize(
    ("place", "reader", "file", "options", "change", "named"),
    [
        ("restart_list", "blip_json", "l.json", (), _other_list, "input: content, size or time"),
        ("restart_folder", "folder", "", (), _other_sidecar, "input: content, size or time"),
        ("restart_key", "laion", "", (), lambda folder: ("--caption-key", "recaption"),
         "caption_key was '' and is 'recaption'"),
        ("restart_mixed", "laion", "", (), lambda folder: ("--caption-key", "recaption"),
         "caption_key was '' and is 'recaption'"),
        ("restart_images", "blip_json", "l.json", ("--images", "A"),
         lambda folder: ("--images", str(folder / "B")), "/B'"),
        ("restart_missing", "blip_json", "l.json", (), _add_images, "input: content, size or time"),
        ("restart_folder", "folder", "", (), lambda folder: ("--max-words", "20"),
         "max_words was 30 and is 20"),
        ("restart_folder", "folder", "", (), lambda folder: ("--allow-outside",),
         "allow_outside was False and is True"),
    ],
)  # fmt: skip
def test_another_conversion_into_the_same_folder(
    place: str,
    reader: str,
    file: str,
    options: tuple[str, ...],
    change: Any,
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the difference; --overwrite starts anew."""
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(CASES / place, folder)
    if place == "restart_missing":
        (folder / "2.jpg").rename(folder / "hidden.jpg")
    first = tuple(str(folder / name) if name == "A" else name for name in options)
    assert convert(reader, folder / file, out, *first) == 0
    before = captions_of(out)
    assert convert(reader, folder / file, out, *first) == 0, "the same again"
    other = change(folder) or first
    capsys.readouterr()
    assert convert(reader, folder / file, out, *other) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was started with other input or options" in message and named in message, message
    assert captions_of(out) == before, "nothing is touched"
    assert convert(reader, folder / file, out, *other, "--overwrite") == 0
    fresh = tmp_path / "fresh"
    assert convert(reader, folder / file, fresh, *other) == 0
    assert captions_of(out) == captions_of(fresh)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in fresh.iterdir())
