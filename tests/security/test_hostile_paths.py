"""Lists with paths outside their folder, and files that are not regular files."""

from __future__ import annotations

import csv
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from data_samples import jpeg

from blip_scale.commands import evaluate, prepare_data
from blip_scale.data.conversion.pairs import RawPair, Source
from blip_scale.data.heldout.listed import listed_pairs
from blip_scale.data.heldout.videos import VideoSet
from blip_scale.data.shards import read_index
from blip_scale.data.sources.readers import READERS
from blip_scale.storage.locations import NotRegularFile, open_file, read_file
from blip_scale.storage.untrusted import RefusedPath, below, relative_name

Write = Callable[[Path, list[str]], Path]
"""write(folder, paths of images) -> the list that names them, with captions."""


def write_csv(folder: Path, paths: list[str]) -> Path:
    return write_table(folder / "captions.csv", paths, ",")


def write_tsv(folder: Path, paths: list[str]) -> Path:
    return write_table(folder / "captions.tsv", paths, "\t")


def write_table(file: Path, paths: list[str], delimiter: str) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["image", "caption"])
        writer.writerows([path, f"caption {number}"] for number, path in enumerate(paths))
    return file


def write_json_lines(folder: Path, paths: list[str]) -> Path:
    items = [{"file_name": path, "text": "a caption"} for path in paths]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder / "metadata.jsonl"


def write_json(items: Callable[[str], Any]) -> Write:
    def write(folder: Path, paths: list[str]) -> Path:
        (folder / "list.json").write_text(json.dumps([items(path) for path in paths]))
        return folder / "list.json"

    return write


def write_karpathy(folder: Path, paths: list[str]) -> Path:
    images = [{"filename": path, "sentences": [{"raw": "a caption"}]} for path in paths]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder / "dataset_coco.json"


def write_coco(folder: Path, paths: list[str]) -> Path:
    content = {
        "images": [{"id": number, "file_name": path} for number, path in enumerate(paths)],
        "annotations": [{"image_id": number, "caption": "a cat"} for number in range(len(paths))],
    }
    (folder / "captions_val.json").write_text(json.dumps(content))
    return folder / "captions_val.json"


def write_visual_genome(folder: Path, paths: list[str]) -> Path:
    """A path is the last two parts of a URL in this format, so only `../name` can be tried."""
    ids = range(len(paths))
    regions = [{"id": number, "regions": [{"phrase": "a cat"}]} for number in ids]
    images = [{"image_id": n, "url": f"https://x/{path}"} for n, path in zip(ids, paths)]  # noqa: B905
    (folder / "region_descriptions.json").write_text(json.dumps(regions))
    (folder / "image_data.json").write_text(json.dumps(images))
    return folder


LISTS: dict[str, tuple[str, Write]] = {
    "csv": ("folder", write_csv),
    "tsv": ("folder", write_tsv),
    "jsonl": ("folder", write_json_lines),
    "blip_json": ("blip_json", write_json(lambda path: {"image": path, "caption": "a cat"})),
    "karpathy": ("coco", write_karpathy),
    "coco": ("coco", write_coco),
    "vqa": ("vqa", write_json(lambda path: {"image": path, "question": "what", "answer": ["a"]})),
    "nlvr2": (
        "nlvr2",
        write_json(lambda path: {"images": ["in.jpg", path], "sentence": "two", "label": "True"}),
    ),
}
"""Kind of list -> the reader that takes it, and how it is written."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with one image, and another image beside the folder."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for place in (folder / "in.jpg", folder / "sub" / "below.jpg", tmp_path / "secret.jpg"):
        place.write_bytes(jpeg(1, (80, 60)))
    (folder / "linked.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "sub" / "same.jpg").symlink_to(folder / "in.jpg")
    (tmp_path / "images-of-others").mkdir()
    (tmp_path / "images-of-others" / "in.jpg").write_bytes(jpeg(2, (80, 60)))
    return folder


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Address of a web server with one image, and the paths requested from it."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            image = jpeg(3, (80, 60))
            self.send_response(200)
            self.send_header("Content-Length", str(len(image)))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(image if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", asked
    web.shutdown()
    web.server_close()


def rejects_of(out: Path) -> dict[str, str]:
    lines = (out / "rejects.jsonl").read_text().splitlines()
    return {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}


def convert(reader: str, location: Path, out: Path, *more: str, code: int = 0) -> None:
    assert prepare_data.main([reader, str(location), str(out), "--workers", "1", *more]) == code


@pytest.mark.parametrize("kind", LISTS)
def test_lists_open_nothing_outside_their_folder(
    kind: str, images: Path, tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    reader, write = LISTS[kind]
    url, asked = server
    outside = [
        "../secret.jpg",
        "sub/../../secret.jpg",
        f"{tmp_path}/secret.jpg",
        f"file://{tmp_path}/secret.jpg",
        f"{tmp_path}/images-of-others/in.jpg",
        "linked.jpg",
        "/dev/zero",
        f"{url}/1.jpg",
        "s3://bucket/1.jpg",
        "nul\0.jpg",
    ]
    inside = ["in.jpg", "sub/below.jpg", "sub/same.jpg", f"{images}/sub/../in.jpg"]
    location = write(images, [*outside, *inside])
    convert(reader, location, tmp_path / "out")
    rejects = rejects_of(tmp_path / "out")
    if reader == "nlvr2":
        rejects = {name.removeprefix("in.jpg "): reason for name, reason in rejects.items()}
    assert rejects == dict.fromkeys(outside, "outside the image folder")
    assert sum(shard.samples for shard in read_index(tmp_path / "out")) == len(inside)
    assert not asked, "and nothing is fetched"


def test_visual_genome_stays_in_its_folder(images: Path, tmp_path: Path) -> None:
    location = write_visual_genome(images, ["../secret.jpg", "sub/below.jpg"])
    convert("visual_genome", location, tmp_path / "out")
    assert rejects_of(tmp_path / "out") == {"0": "outside the image folder"}


def test_outside_on_request(images: Path, tmp_path: Path, server: tuple[str, list[str]]) -> None:
    url, asked = server
    places = ["../secret.jpg", f"{tmp_path}/secret.jpg", "linked.jpg", f"{url}/1.jpg"]
    write_csv(images, places)
    convert("folder", images, tmp_path / "out", "--allow-outside")
    assert rejects_of(tmp_path / "out") == {} and "/1.jpg" in asked
    write_json(lambda path: {"url": path, "caption": "a cat"})(images, [f"{url}/2.jpg"])
    convert("blip_json", images / "list.json", tmp_path / "urls", "--allow-outside")
    assert rejects_of(tmp_path / "urls") == {} and "/2.jpg" in asked
    convert("blip_json", images / "list.json", tmp_path / "none", code=2)
    assert rejects_of(tmp_path / "none") == {f"{url}/2.jpg": "outside the image folder"}


def test_images_may_be_the_users_link(images: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(images)
    lists = tmp_path / "lists"
    lists.mkdir()
    write_csv(lists, ["in.jpg", "../secret.jpg"])
    more = ["--images", str(tmp_path / "elsewhere")]
    convert("folder", lists, tmp_path / "out", *more)
    assert rejects_of(tmp_path / "out") == {"../secret.jpg": "outside the image folder"}


@pytest.fixture
def odd_files(images: Path) -> Iterator[Path]:
    """Folder with a FIFO, a link to a device, a socket and a folder, all named *.jpg."""
    os.mkfifo(images / "fifo.jpg")
    (images / "zero.jpg").symlink_to("/dev/zero")
    (images / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(images / "socket.jpg"))
        yield images


@pytest.mark.timeout(60)
def test_only_regular_files_are_read(odd_files: Path, tmp_path: Path) -> None:
    os.mkfifo(odd_files / "in.txt")
    special = ("fifo.jpg", "zero.jpg", "socket.jpg", "in.jpg")
    for name in special[:3]:
        (odd_files / name).with_suffix(".txt").write_text("a cat")
    convert("folder", odd_files, tmp_path / "out", code=2)
    rejects = rejects_of(tmp_path / "out")
    assert {name: rejects[name] for name in special} == dict.fromkeys(special, "no regular file")
    write_csv(odd_files, [*special, "folder.jpg", "in.jpg"])
    convert("folder", odd_files, tmp_path / "listed")
    rejects = rejects_of(tmp_path / "listed")
    assert rejects["fifo.jpg"] == rejects["socket.jpg"] == "no regular file"
    assert rejects["zero.jpg"] == "outside the image folder"
    assert rejects["folder.jpg"] == "missing image"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("reader", "name"),
    [("laion", "00000.tar"), ("laion", "00000.parquet"), ("laion", "00000/1.txt")],
)
def test_sets_of_files_hold_regular_files(
    reader: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "in" / name
    place.parent.mkdir(parents=True)
    os.mkfifo(place)
    assert prepare_data.main([reader, str(tmp_path / "in"), str(tmp_path / "out")]) in (0, 2)
    output = capsys.readouterr()
    assert "no regular file" in output.out + output.err


@pytest.mark.timeout(60)
def test_the_input_itself_is_a_regular_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "list.json")
    for reader in ("coco", "blip_json", "vqa", "nlvr2", "visdial"):
        assert prepare_data.main([reader, f"{tmp_path}/list.json", f"{tmp_path}/out"]) == 2
        output = capsys.readouterr().err
        assert "list.json is a FIFO, not a regular file" in output and output.count("\n") == 1


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_named(odd_files: Path) -> None:
    for read in (read_file, open_file):
        for name, kind in (("fifo", "a FIFO"), ("zero", "a device"), ("socket", "a socket")):
            with pytest.raises(NotRegularFile, match=f"{name}.jpg is {kind}"):
                read(str(odd_files / f"{name}.jpg"))
        with pytest.raises(IsADirectoryError):
            read(str(odd_files / "folder.jpg"))


def test_held_out_lists_stay_in_their_folder(images: Path, tmp_path: Path) -> None:
    def opened(path: str, below: str | None) -> Any:
        file = LISTS["coco"][1](images, ["in.jpg", path])
        source = Source(str(file))
        pairs = [pair for chunk in READERS["coco"].chunks(source) for pair in chunk.read()]
        return listed_pairs("list", pairs, 32, images_below=below)

    for path in ("../secret.jpg", f"{tmp_path}/secret.jpg", "linked.jpg", "https://host/1.jpg"):
        with pytest.raises(ValueError, match="--allow-outside"):
            opened(path, str(images))
    assert len(opened("sub/same.jpg", str(images))) == 2
    assert len(opened("../secret.jpg", None)) == 2


def test_evaluation_refuses_a_list_that_leads_outside(images: Path) -> None:
    file = LISTS["coco"][1](images, ["in.jpg", "../secret.jpg"])
    options = evaluate._parser("evaluate.py").parse_args(["retrieval", "checkpoint", str(file)])
    with pytest.raises(ValueError, match=r"\.\./secret\.jpg is not below .*images"):
        evaluate._open(options, evaluate.KINDS["retrieval"], 32)
    options.allow_outside = True
    assert len(evaluate._open(options, evaluate.KINDS["retrieval"], 32)) == 2


@pytest.mark.timeout(60)
def test_clips_stay_in_their_folder(images: Path, tmp_path: Path) -> None:
    def videos(clip: str, allow_outside: bool = False) -> VideoSet:
        line = json.dumps({"clip_name": clip, "caption": "a cat"})
        (tmp_path / "list.jsonl").write_text(line)
        return VideoSet(tmp_path / "list.jsonl", images, 32, allow_outside)

    for clip in ("../images-of-others", f"{tmp_path}/images-of-others", ".."):
        with pytest.raises(ValueError, match="is not below"):
            videos(clip)
        assert len(videos("../images-of-others", allow_outside=True)) == 1
    os.mkfifo(images / "sub" / "below.png")
    opened = videos("sub")
    assert opened.frames(0, 3).float().std() == 0
    assert "FIFO" in opened.unreadable["sub"]


def test_videos_are_no_playlists(images: Path, tmp_path: Path) -> None:
    """FFmpeg reads a list of files named *.avi as a video, and would open the files in it."""
    av = pytest.importorskip("av")
    import numpy as np

    with av.open(str(images / "other.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        white = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), "rgb24")
        container.mux([*stream.encode(white), *stream.encode(None)])
    (images / "list.avi").write_text("ffconcat version 1.0\nfile other.mp4\n")
    lines = [json.dumps({"clip_name": name, "caption": "a"}) for name in ("other", "list")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    opened = VideoSet(tmp_path / "list.jsonl", images, 32)
    assert opened.frames(0, 2).float().mean() > 200
    assert opened.frames(1, 2).float().mean() < 200
    assert set(opened.unreadable) == {"list"}


@pytest.mark.parametrize(
    ("folder", "location"),
    [
        ("s3://bucket/images", "s3://bucket/images/../x.jpg"),
        ("s3://bucket/images", "s3://bucket/images2/x.jpg"),
        ("s3://bucket/images", "/etc/passwd"),
        ("https://host/images", "https://other/images/x.jpg"),
        ("https://host/images", "https://host/images/%2e%2e/x.jpg"),
        ("https://host/images", "file:///etc/passwd"),
        ("/data", "s3://data/x.jpg"),
        ("/data", "/data"),
        ("/data", "/database/x.jpg"),
    ],
)
def test_folders_in_buckets_hold_too(folder: str, location: str) -> None:
    with pytest.raises(RefusedPath):
        below(folder, location)
    inside = f"{folder}/sub/x.jpg"
    assert below(folder, inside) == inside


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/x", "a/../x", "a//x", "a\\x", "a\nx", "a\x1b[2Jx", "s3://b/x", "a\0",
     "x" * 256, "a/", "half\ud83d"],
)  # fmt: skip
def test_names_of_files(name: str) -> None:
    with pytest.raises(ValueError, match=r"^the file name .* is not a relative path"):
        relative_name(name)
    assert relative_name("0/shard.00000.mds.zstd") == "0/shard.00000.mds.zstd"


def test_a_new_reader_is_held_to_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are checked where they are opened, so that no reader can forget it."""
    from blip_scale.data.conversion.lists import in_chunks
    from blip_scale.data.sources.readers import SourceReader

    pairs = [RawPair("a", f"{images}/../secret.jpg", "a"), RawPair("b", f"{images}/in.jpg", "b")]
    reader = SourceReader(lambda source: in_chunks(list(pairs), 10), "two images")
    monkeypatch.setitem(READERS, "two", reader)
    convert("two", images, tmp_path / "out")
    assert rejects_of(tmp_path / "out") == {"a": "outside the image folder"}
