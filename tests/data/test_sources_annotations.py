"""COCO, Visual Genome, BLIP's lists and plain folders in their distributed forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from odd_files import EMOJI_CAPTION, RIGHT_TO_LEFT_CAPTION, pairs, read_all, rejects

from blip_scale.data.conversion.pairs import Found, Source, Unused
from blip_scale.data.sources import json_lists
from blip_scale.data.sources.readers import READERS


def read(
    name: str, location: Path, images: str = "", strip_prefix: str = "", **options: str
) -> list[Found]:
    source = Source(str(location), images, strip_prefix)
    return read_all(list(READERS[name].chunks(source, **options)))


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def karpathy(number: int, split: str, folder: str = "val2014") -> dict[str, Any]:
    sentences = [
        {
            "tokens": ["a", "man"],
            "raw": f"A man, {number}-{i}.",
            "imgid": number,
            "sentid": 10 * number + i,
        }
        for i in range(5)
    ]
    return {
        "filepath": folder, "sentids": [s["sentid"] for s in sentences],
        "filename": f"COCO_{folder}_{number:012}.jpg", "imgid": number, "split": split,
        "sentences": sentences, "cocoid": number,
    }  # fmt: skip


@pytest.fixture
def dataset_coco(tmp_path: Path) -> Path:
    images = [
        karpathy(1, "test"),
        karpathy(2, "restval"),
        karpathy(3, "val"),
        karpathy(4, "train", "train2014"),
        {"filename": "no_sentences.jpg", "split": "train"},
    ]
    return save(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})


def test_karpathy(dataset_coco: Path) -> None:
    items = read("coco", dataset_coco, split="train")
    root = dataset_coco.parent
    (second, fourth) = pairs(items).values()
    assert second.id == "val2014/COCO_val2014_000000000002.jpg"
    assert second.image == f"{root}/val2014/COCO_val2014_000000000002.jpg"
    assert second.captions == [f"A man, 2-{i}." for i in range(5)]
    assert fourth.image == f"{root}/train2014/COCO_train2014_000000000004.jpg"
    assert rejects(items) == [("dataset_coco.json:4", "missing key")]
    assert len(pairs(read("coco", dataset_coco))) == 4
    (third,) = pairs(read("coco", dataset_coco, split="val", images="/coco")).values()
    assert third.image == "/coco/val2014/COCO_val2014_000000000003.jpg"
    assert len(read("coco", root)) == 5
    with pytest.raises(ValueError, match="COCO has train, val, test"):
        read("coco", dataset_coco, split="minival")


def test_blip_lists_of_coco(tmp_path: Path) -> None:
    entries = []
    for i in range(5):
        for name in ("a", "b"):
            image = {"image": f"val2014/{name}.jpg", "image_id": f"coco_{name}"}
            entries.append({"caption": f"caption {i}"} | image)
    train = save(tmp_path / "coco_karpathy_train.json", entries)
    items = pairs(read("coco", train, images="s3://bucket/coco/"))
    assert list(items) == ["val2014/a.jpg", "val2014/b.jpg"], "one record an image"
    assert items["val2014/b.jpg"].captions == [f"caption {i}" for i in range(5)]
    assert items["val2014/b.jpg"].image == "s3://bucket/coco/val2014/b.jpg"
    val = save(
        tmp_path / "coco_karpathy_val.json", [{"image": "val2014/c.jpg", "caption": ["one", "two"]}]
    )
    (third,) = pairs(read("coco", val)).values()
    assert third.captions == ["one", "two"] and third.image == f"{tmp_path}/val2014/c.jpg"
    with pytest.raises(ValueError, match="leave --split out"):
        read("coco", val, split="val")
    with pytest.raises(ValueError, match=r"neither dataset_coco.*keys: annotations"):
        read("coco", save(tmp_path / "captions_val2014.json", {"annotations": []}))


def region(image_id: int, number: int, phrase: str | None) -> dict[str, Any]:
    return {
        "region_id": 1000 * image_id + number, "width": 82, "height": 139, "image_id": image_id,
        "phrase": phrase, "y": 57, "x": 421,
    }  # fmt: skip


def test_visual_genome_as_distributed(tmp_path: Path) -> None:
    save(
        tmp_path / "region_descriptions.json",
        [
            {"id": 1, "regions": [region(1, 0, "the clock is green"), region(1, 1, None)]},
            {"regions": [region(2, 0, "older releases have no id here")]},
            {"id": 3, "regions": []},
            {"id": 4, "regions": [region(4, 0, "image_data lacks it")]},
            {"id": 5},
        ],
    )
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/{}.jpg"
    save(
        tmp_path / "image_data.json",
        [
            {"width": 800, "url": url.format(i), "height": 600, "image_id": i, "coco_id": None,
             "flickr_id": None}
            for i in (1, 2, 3)
        ],
    )  # fmt: skip
    items = read("visual_genome", tmp_path)
    first, second, third = pairs(items).values()
    assert first.id == "1" and first.captions == ["the clock is green", None]
    assert first.image == f"{tmp_path}/VG_100K_2/1.jpg" and first.url == url.format(1)
    assert second.id == "2" and third.captions == []
    assert rejects(items) == [
        ("4", "missing image"), ("region_descriptions.json:4", "missing key"),
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError):
        read("visual_genome", tmp_path / "nowhere")


def test_visual_genome_as_blip_uses_it(tmp_path: Path) -> None:
    prefix = "/export/share/datasets/vision/visual-genome/"
    path = save(
        tmp_path / "vg_caption.json",
        [
            {"image": f"{prefix}image/1.jpg", "caption": "the clock is green"},
            {"image": f"{prefix}image/2.jpg", "caption": "a car"},
            {"image": f"{prefix}image/1.jpg", "caption": "shade is along the street"},
        ],
    )
    items = pairs(read("visual_genome", path, images="/vg", strip_prefix=prefix))
    assert list(items) == ["image/1.jpg", "image/2.jpg"]
    assert items["image/1.jpg"].image == "/vg/image/1.jpg"
    assert items["image/1.jpg"].captions == ["the clock is green", "shade is along the street"]
    kept = pairs(read("visual_genome", path))
    assert kept[f"{prefix}image/2.jpg"].image == f"{prefix}image/2.jpg", "absolute as it is"


def test_lists_of_blip(tmp_path: Path) -> None:
    save(
        tmp_path / "lists" / "ccs_filtered.json",
        [
            {"url": "http://host.example/1.jpg", "caption": EMOJI_CAPTION},
            {"image": "a/2.jpg", "caption": RIGHT_TO_LEFT_CAPTION, "url": "http://host.example/2"},
            {"image": "a/3.jpg"},
            {"caption": "no image and no url"},
            "a text",
            {"image": 7, "caption": "no path"},
        ],
    )
    save(tmp_path / "lists" / "more.json", [{"image": "a/2.jpg", "caption": ["a second text"]}])
    items = read("blip_json", tmp_path / "lists")
    first, second, third = pairs(items).values()
    assert (first.id, first.image) == ("http://host.example/1.jpg",) * 2
    assert first.captions == [EMOJI_CAPTION]
    assert second.image == f"{tmp_path}/lists/a/2.jpg" and second.url == "http://host.example/2"
    assert second.captions == [RIGHT_TO_LEFT_CAPTION, "a second text"], "over all lists"
    assert third.captions == [None]
    assert rejects(items) == [
        ("ccs_filtered.json:3", "missing key"),
        ("ccs_filtered.json:4", "damaged input"),
        ("ccs_filtered.json:5", "missing key"),
    ]
    (tmp_path / "broken.json").write_text('[{"image": "a.jpg", "capt')
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        read("blip_json", tmp_path / "broken.json")
    with pytest.raises(ValueError, match="holds no list"):
        read("blip_json", save(tmp_path / "object.json", {"image": "a.jpg"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no \.json"):
        read("blip_json", tmp_path / "empty")


def test_a_folder_with_texts_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jpg", "a.PNG", "deep/c.jpg", "deep/notes.md", "alone.txt", "d.webp"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "a.txt").write_text(EMOJI_CAPTION, encoding="utf-8")
    (tmp_path / "deep" / "c.txt").write_text("a cow\non two lines\n")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    chunks = list(READERS["folder"].chunks(Source(str(tmp_path), pairs_per_chunk=3)))
    assert [(chunk.name, chunk.pairs) for chunk in chunks] == [("0 to 2", 3), ("3 to 3", 2)]
    assert rejects(read_all(chunks)) == [("alone.txt", "missing image")]
    assert [item for item in read_all(chunks) if isinstance(item, Unused)] == [Unused("files .md")]
    items = pairs(read_all(chunks))
    assert {name: pair.captions for name, pair in items.items()} == {
        "a.PNG": EMOJI_CAPTION, "b.jpg": None, "d.webp": b"\xff\xfe",
        "deep/c.jpg": "a cow\non two lines\n",
    }  # fmt: skip
    assert items["deep/c.jpg"].image == f"{tmp_path}/deep/c.jpg"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no image"):
        read("folder", tmp_path / "empty")


CSV = (
    "\ufeffimage,caption,similarity\n"
    'a.jpg,"a dog, running",0.5\n'
    "b.jpg,كلب,\n"
    'a.jpg,"two\nlines",\n'
    ",no image,\n"
    "c.jpg,,\n"
    "short.jpg\n"
)


@pytest.mark.parametrize("name", ["captions.csv", "metadata.csv"])
def test_a_folder_with_a_table(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(CSV, encoding="utf-8")
    (tmp_path / "unlisted.jpg").write_bytes(b"not in the table")
    items = read("folder", tmp_path)
    assert {key: pair.captions for key, pair in pairs(items).items()} == {
        "a.jpg": ["a dog, running", "two\nlines"], "b.jpg": ["كلب"], "c.jpg": [""],
        "short.jpg": [None],
    }  # fmt: skip
    assert pairs(items)["a.jpg"].similarity == 0.5 and pairs(items)["b.jpg"].similarity is None
    assert rejects(items) == [(f"{name}:6", "missing key")]
    assert [item for item in items if isinstance(item, Unused)] == [
        Unused("images that no table names")
    ]


def read_text(folder: Path, name: str, text: str | bytes, **options: str) -> list[Found]:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return read("folder", folder / name, **options)


def test_a_tsv_has_no_quoting(tmp_path: Path) -> None:
    """An open quote loses nothing, however long the file is."""
    rows = [f'{i}.jpg\t"number {i}' for i in range(50_000)]
    items = read_text(tmp_path, "a.tsv", "image\tcaption\n" + "\n".join(rows))
    assert len(pairs(items)) == 50_000 and not rejects(items)
    assert pairs(items)["7.jpg"].captions == ['"number 7']


def test_an_open_quote_in_a_csv_costs_one_row(tmp_path: Path) -> None:
    text = 'image,caption\na.jpg,"never closed\nb.jpg,a dog\nc.jpg,"two\nlines"\nd.jpg,"x"y,\n'
    items = read_text(tmp_path, "a.csv", text)
    assert {key: pair.captions for key, pair in pairs(items).items()} == {
        "b.jpg": ["a dog"], "c.jpg": ["two\nlines"],
    }  # fmt: skip
    assert rejects(items) == [("a.csv:2", "damaged input"), ("a.csv:6", "damaged input")]
    many = [f'{i}.jpg,"{"x" * 5000}' if i == 5 else f"{i}.jpg,a dog" for i in range(3000)]
    items = read_text(tmp_path, "b.csv", "image,caption\n" + "\n".join(many))
    assert len(pairs(items)) == 2999 and rejects(items) == [("b.csv:7", "damaged input")]


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("image;caption\na.jpg;a dog, running\n", ["a dog, running"]),
        ("image\tcaption\na.jpg\ta dog, running\n", ["a dog, running"]),
        ("Image, Caption\na.jpg , a dog\n", ["a dog"]),
        ('caption,image\n"[""a"", ""b""]",a.jpg\n', ["a", "b"]),
        ("caption,image\n[removed],a.jpg\n", ["[removed]"]),
        ("image,caption\r\na.jpg,u2028 \u2028 stays\r\n", ["u2028 \u2028 stays"]),
        ("\ufeffimage,caption\na.jpg,a dog\n".encode("utf-16-le"), ["a dog"]),
        ("\ufeffimage,caption\na.jpg,a dog\n".encode("utf-16-be"), ["a dog"]),
    ],
)
def test_dialects_of_csv(text: str | bytes, captions: list[str], tmp_path: Path) -> None:
    (pair,) = pairs(read_text(tmp_path, "a.csv", text)).values()
    assert pair.captions == captions and pair.image == f"{tmp_path}/a.jpg"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "a.jpg,a dog\n",
            {},
            r"a\.csv:1: the first line is 'a\.jpg, a dog'.*--columns",
        ),
        ("image,label\na.jpg,a dog\n", {}, r"no column for the caption .* give --caption-key"),
        ("image,text,text\na.jpg,a,b\n", {}, r"several of 3 columns have the name 'text'"),
        ("image,caption\n".encode("utf-16-le"), {}, r"a\.csv:1 holds zero bytes: give --encoding"),
        ("", {}, r"a\.csv is empty"),
        ("sep=;\n", {}, r"a\.csv is empty"),
        ("image,caption\ra.jpg,a dog\r", {}, r"a\.csv: its lines end as on a classic Mac"),
        ("a.jpg,a dog\rb.jpg,two\r", {"columns": "image,caption"}, r"tr '\\r' '\\n' < a\.csv"),
        ("image,caption\n", {"encoding": "no-such"}, "--encoding no-such"),
    ],
)
def test_a_table_that_leaves_room_for_doubt(
    text: str | bytes, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path, "a.csv", text, **options)


@pytest.mark.parametrize("options", [{}, {"columns": "image,caption"}])
@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_the_first_line_of_excel(separator: str, options: dict[str, str], tmp_path: Path) -> None:
    header = "" if options else f"image{separator}caption\r\n"
    text = f'sep={separator}\r\n{header}a.jpg{separator}"a, b"\r\nb.jpg{separator}c\r\n'
    items = read_text(tmp_path, "a.csv", text, **options)
    assert {name: pair.captions for name, pair in pairs(items).items()} == {
        "a.jpg": ["a, b"], "b.jpg": ["c"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "image\tcaption\ra.jpg\ta dog\r"),
        ("a.jsonl", '{"image": "a.jpg", "caption": "a"}\r{"image": "b.jpg", "caption": "b"}\r'),
    ],
)
def test_line_ends_of_a_classic_mac(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its lines end as on a classic Mac"):
        read_text(tmp_path, name, text)


def test_carriage_returns_inside_rows(tmp_path: Path) -> None:
    for name, text, options in (
        ("a.csv", 'a.jpg,"a\rb"\n', {"columns": "image,caption"}),
        ("b.tsv", "a.jpg\ta\rb\n", {"columns": "image,caption"}),
        ("c.jsonl", '{"image":\r"a.jpg",\r"caption": "a\\rb"}\n', {}),
    ):
        items = read_text(tmp_path, name, text, **options)
        assert pairs(items)["a.jpg"].captions == ["a\rb"]


def test_a_table_of_bad_rows(tmp_path: Path) -> None:
    text = b"image,caption\na.jpg,a,b\nb.jpg,caf\xe9\nc.jpg,a\0b\nd.jpg,['a' 'b']\n"
    items = read_text(tmp_path, "a.csv", text)
    assert list(pairs(items)) == ["c.jpg"]
    assert [place for place, _ in rejects(items)] == ["a.csv:2", "a.csv:3", "a.csv:5"]


def test_tables_of_folders_below(tmp_path: Path) -> None:
    """Each table is read. Links to folders are followed once."""
    for folder in ("train", "train/deep", "test"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "metadata.csv").write_text("file_name,text\n0.png,a dog\n")
    (tmp_path / "in" / "a_link").symlink_to("train")
    items = read("folder", tmp_path / "in")
    assert sorted(pairs(items)) == ["test/0.png", "train/0.png", "train/deep/0.png"]
    assert pairs(items)["test/0.png"].image == f"{tmp_path}/in/test/0.png"


def test_a_folder_with_json_lines(tmp_path: Path) -> None:
    lines = [
        json.dumps({"file_name": "a.jpg", "text": EMOJI_CAPTION, "url": "http://host.example/a"}),
        "",
        json.dumps({"file_name": "b.jpg", "captions": ["one", "two"]}),
        '{"file_name": "c.jpg", "te',
        json.dumps(["no object"]),
        json.dumps({"text": "no image"}),
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for place in (tmp_path, tmp_path / "captions.jsonl"):
        items = read("folder", place)
        assert {key: pair.captions for key, pair in pairs(items).items()} == {
            "a.jpg": [EMOJI_CAPTION], "b.jpg": ["one", "two"],
        }  # fmt: skip
        assert pairs(items)["a.jpg"].url == "http://host.example/a"
        assert rejects(items) == [
            ("captions.jsonl:4", "damaged input"),
            ("captions.jsonl:5", "damaged input"),
            ("captions.jsonl:6", "missing key"),
        ]
    (tmp_path / "a.jpg").write_bytes(b"an image")
    with pytest.raises(ValueError, match=r"neither a folder nor a \.csv"):
        read("folder", tmp_path / "a.jpg")


COCO_IMAGES = [{"id": number, "file_name": f"{number}.jpg"} for number in range(300)]
COCO_CAPTIONS = [{"image_id": n % 300, "caption": f"caption {n} é"} for n in range(1500)]
KARPATHY = [
    {
        "filename": f"{n}.jpg",
        "split": "train",
        "sentences": [{"raw": f"{n} é a"}, {"raw": f"{n} é b"}],
    }
    for n in range(300)
]
COCO_FILES = {
    "own": {"info": {"images": []}, "images": COCO_IMAGES, "annotations": COCO_CAPTIONS},
    "captions first": {"annotations": COCO_CAPTIONS, "images": COCO_IMAGES},
    "karpathy": {"images": KARPATHY, "dataset": "coco"},
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("name", COCO_FILES)
def test_objects_are_read_item_by_item(
    name: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever blocks end."""
    monkeypatch.setattr(json_lists, "_BLOCK_BYTES", 1 << 10)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(COCO_FILES[name], ensure_ascii=False), encoding=encoding)
    chunks = list(READERS["coco"].chunks(Source(str(path), pairs_per_chunk=128)))
    assert [(chunk.name, chunk.pairs) for chunk in chunks] == [
        ("0 to 127", 128), ("128 to 255", 128), ("256 to 299", 44),
    ]  # fmt: skip
    expected = {f"{n}.jpg": [f"{n} é a", f"{n} é b"] for n in range(300)}
    if name != "karpathy":
        expected = {}
        for caption in COCO_CAPTIONS:
            expected.setdefault(f"{caption['image_id']}.jpg", []).append(str(caption["caption"]))
    assert {key: pair.captions for key, pair in pairs(read_all(chunks)).items()} == expected


@pytest.mark.parametrize("name", COCO_FILES)
def test_an_object_that_is_cut_off_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = json.dumps(COCO_FILES[name]).encode()
    for size in range(1, len(content), len(content) // 50):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"a\.json is not JSON: ") as caught:
            READERS["coco"].chunks(Source(str(path)))
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(content[:size])
        assert str(caught.value).endswith(str(expected.value))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"images": [], "images": []}', "The name 'images' comes twice"),
        ('{"images": []} []', "Extra data"),
        ('{"images": null}', r"neither dataset_coco.json nor a list of captions \(keys: images\)"),
        ('{"images": [{}], "annotations": {"1": "a dog"}}', "its annotations are no list"),
        ('{"images": [' + "[" * 100_000, "nested too deep"),
        ("", "no object"),
    ],
)
def test_objects_of_another_form(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        READERS["coco"].chunks(Source(str(path)))
