"""Overlays: captions joined to the images of finished shards, counted, and read beside them."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_samples import MakeLoader, jpeg, stream, take
from odd_files import members, write_tar
from pyarrow import parquet

from blip_scale.commands import overlay, prepare_data, show_shards
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.loading.order import SampleOrder, StreamShape
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.reading import shard_table
from blip_scale.data.reading.inventory import inventory
from blip_scale.data.reading.prefetch import Prefetcher
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.data.shards import Record, write_shards
from blip_scale.data.sources.metadata import pair_of

COUNT = 30


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """30 samples in several shards; the last one has no uid, two have the same URL."""

    def record(number: int) -> Record:
        return Record(
            f"i/{number}", jpeg(number), f"alt {number}", "web", url=f"http://x/{number // 2}",
            uid=f"u{number}" if number < COUNT - 1 else "",
        )  # fmt: skip

    folder = tmp_path / "images"
    write_shards(folder, map(record, range(COUNT)), shard_size="20kb")
    return folder


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


def make(images: Path, captions: Path, out: Path, *more: str, code: int = 0) -> dict[str, Any]:
    """Run the command; returns overlay.json."""
    assert overlay.main([str(images), str(captions), str(out), *more]) == code
    if code:
        return {}
    manifest: dict[str, Any] = json.loads((out / "overlay.json").read_text())
    counts = manifest["captions"]
    assert counts["read"] == sum(counts[name] for name in counts if name != "read")
    assert manifest["samples"]["all"] == COUNT
    return manifest


def captions_of(images: Path, *overlays: Path) -> dict[str, dict[str, Any]]:
    recipe = StreamRecipe("set", str(images), overlays=[str(folder) for folder in overlays])
    store = StreamStore(recipe)
    samples = [store.read(*place) for place in store.places(range(store.samples))]
    return {sample["id"]: sample for sample in samples}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_captions_join_in_any_form_and_by_any_key(images: Path, tmp_path: Path) -> None:
    before = contents(images)
    shas = [hashlib.sha256(jpeg(number)).hexdigest() for number in range(COUNT)]
    rows = [{"uid": f"u{n}", "sha256": shas[n], "re": f"Re {n}. End."} for n in range(COUNT - 1)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "re.parquet")
    lines = write_lines(tmp_path / "re.jsonl", rows)
    samples = [(str(n), {"json": json.dumps(row).encode()}) for n, row in enumerate(rows)]
    tar = write_tar(tmp_path / "i.tar", members(*samples))
    outs = []
    for number, (file, key, *more) in enumerate(
        [(tmp_path / "re.parquet", "uid"), (lines, "sha256"), (tar, "id", "--tar-ids")]
    ):
        out = tmp_path / f"out{number}"
        manifest = make(images, file, out, "--join", key, "--caption-key", "re", *more)
        assert manifest["captions"]["joined"] == COUNT - 1
        assert manifest["samples"]["without_captions"] == 1
        outs.append(out)
    assert len({json.dumps(sorted(contents(out))) for out in outs}) == 1
    shards = [[c for n, c in sorted(contents(out).items()) if n.endswith(".mds")] for out in outs]
    assert shards[0] == shards[1] == shards[2]
    assert contents(images) == before, "no image is touched"
    joined = captions_of(images, outs[0])
    assert joined["i/3"]["captions"] == ["alt 3", "Re 3. End."]
    assert joined["i/3"]["roles"] == ["caption", "re"]
    assert joined[f"i/{COUNT - 1}"]["captions"] == [f"alt {COUNT - 1}"]
    both = captions_of(images, outs[0], outs[1])
    assert both["i/3"]["roles"] == ["caption", "re", "re"]


def test_every_record_with_a_key_joins_whichever_records_lack_it(tmp_path: Path) -> None:
    """A chunk whose first record lacks uid and hash keeps those of the others."""
    lacking, other = {0, 1, 5}, {"caption": "alt"}
    samples = []
    for number in range(12):
        keys = {} if number in lacking else {"uid": f"u{number}", "sha256": f"{number:064}"}
        meta = json.dumps(other | keys).encode()
        samples.append((str(number), {"jpg": jpeg(number), "json": meta}))
    for number, part in enumerate((samples[:2], samples[2:5], samples[5:])):
        write_tar(tmp_path / "tars" / f"{number}.tar", members(*part))
    images, tars = str(tmp_path / "images"), str(tmp_path / "tars")
    words = ["webdataset", tars, images, "--workers", "1", "--min-side", "8"]
    assert prepare_data.main(words) == 0
    summary = json.loads((tmp_path / "images" / "summary.json").read_text())
    assert summary["pairs"]["written"] == 12 and not summary.get("tallies")
    for key in ("uid", "sha256"):
        rows = [{key: json.loads(meta["json"]).get(key, ""), "re": "new"} for _, meta in samples]
        out = tmp_path / key
        lines = write_lines(tmp_path / f"{key}.jsonl", rows)
        words = [images, str(lines), str(out), "--join", key, "--caption-key", "re"]
        assert overlay.main(words) == 0
        manifest = json.loads((out / "overlay.json").read_text())
        assert manifest["captions"]["joined"] == 9
        joined = captions_of(tmp_path / "images", out)
        got = {name.partition("/")[2] for name, row in joined.items() if len(row["captions"]) == 2}
        assert got == {str(number) for number in range(12)} - {str(n) for n in lacking}


def test_a_damaged_file_is_named_with_its_damage(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "bad.jsonl", ['{"url": '])
    make(images, lines, tmp_path / "out", "--join", "url", "--caption-key", "re", code=2)
    message = capsys.readouterr().err
    assert "damaged input (bad.jsonl:1: no JSON" in message and "--caption-key" not in message


def test_hashes_in_upper_case_and_files_that_are_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows up to the damage of a file count."""
    shas = [hashlib.sha256(jpeg(number)).hexdigest() for number in range(4)]
    records = [
        Record(f"{number}", jpeg(number), "alt", "web", sha256=sha.upper() if number else "")
        for number, sha in enumerate(shas)
    ]
    write_shards(tmp_path / "images", records)
    folder = tmp_path / "captions"
    folder.mkdir()
    upper = [{"sha256": sha.upper(), "re": "new"} for sha in shas[:2]]
    write_lines(folder / "a.jsonl", [*upper, {"sha256": shas[2], "re": "new"}])
    packed = gzip.compress(json.dumps({"sha256": shas[3], "re": "new"}).encode() + b"\n")
    (folder / "b.jsonl.gz").write_bytes(packed + packed[:-4])
    table = pa.table({"a": ["x"], "b": ["y"]}).rename_columns(["re", "re"])
    parquet.write_table(table, folder / "c.parquet")
    (folder / "d.csv").write_text("sha256,re\n")
    words = [str(tmp_path / "images"), str(folder), str(tmp_path / "out"), "--join", "sha256"]
    assert overlay.main([*words, "--caption-key", "re"]) == 0
    manifest = json.loads((tmp_path / "out" / "overlay.json").read_text())
    assert manifest["captions"]["joined"] == 4
    assert manifest["rejects"] == {"damaged input": 2}
    assert "1 files are no parquet, JSON lines or tars and are not read, the first: d.csv" in (
        caplog.text
    )


def test_nothing_is_lost_silently(images: Path, tmp_path: Path) -> None:
    rows = [
        {"url": "http://x/0", "re": ["one", "", 7, None], "syn": "two"},
        {"url": "http://x/99", "re": "nobody's"},
        {"re": "no key"},
        {"url": {"a": 1}, "re": "odd key"},
        {"url": "\ud800", "re": "half a pair"},
        "no json",
        "[1]",
        {"url": "http://x/1", "re": "again"},
        {"url": "http://x/1", "re": "again"},
        {"url": "http://x/2"},
        {"url": "http://x/3", "re": []},
    ]
    out = tmp_path / "out"
    manifest = make(
        images, write_lines(tmp_path / "c.jsonl", rows), out,
        "--join", "url", "--caption-key", "re,syn",
    )  # fmt: skip
    assert manifest["captions"] == {
        "read": 15, "joined": 3, "unjoined": 1, "rejected": 10, "duplicates": 1,
    }  # fmt: skip
    assert manifest["roles"] == {"re": 4, "syn": 2}, "two images have each URL"
    assert manifest["samples"] == {"all": 30, "with_captions": 4, "without_captions": 26}
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {
        "id": "c.jsonl:2",
        "reason": "no such image",
        "detail": "http://x/99",
        "captions": 1,
    } in (rejects)
    assert len(rejects) == 11
    assert captions_of(images, out)["i/1"]["captions"] == ["alt 1", "one", "two"]


@pytest.mark.parametrize(
    ("rule", "captions"), [("first", ["alt 0", "a"]), ("all", ["alt 0", "a", "b"])]
)
def test_duplicates_follow_a_rule(
    images: Path, tmp_path: Path, rule: str, captions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "c.jsonl", [{"uid": "u0", "re": "a"}, {"uid": "u0", "re": "b"}])
    keys = ("--join", "uid", "--caption-key", "re")
    make(images, file, tmp_path / "refused", *keys, code=2)
    assert "c.jsonl:2 and c.jsonl:1 have other captions" in capsys.readouterr().err
    assert not (tmp_path / "refused" / INDEX_NAME).exists()
    make(images, file, tmp_path / "out", *keys, "--duplicates", rule)
    assert captions_of(images, tmp_path / "out")["i/0"]["captions"] == captions


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--join", "uid", "--caption-key", "no"), "missing caption"),
        (("--join", "id", "--caption-key", "re"), "none of their keys is the id of an image"),
        (("--join", "uid", "--caption-key", "re,,"), "expected KEY or ROLE=KEY"),
    ],
)
def test_what_joins_nothing_is_refused(
    images: Path, tmp_path: Path, more: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = write_lines(tmp_path / "c.jsonl", [{"uid": "u0", "id": "i/99", "re": "a"}])
    make(images, file, tmp_path / "out", *more, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2


def test_images_without_the_key_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "old", [Record("0", jpeg(0), "a", "web")])
    file = write_lines(tmp_path / "c.jsonl", [{"uid": "u0", "re": "a"}])
    make(tmp_path / "old", file, tmp_path / "out", "--join", "uid", "--caption-key", "re", code=2)
    assert "the shards have no column uid" in capsys.readouterr().err


def test_keys_join_in_any_form_that_is_exact(tmp_path: Path) -> None:
    """Floats that are integers, and hashes as bytes. What may be several keys is rejected."""
    shas = [hashlib.sha256(jpeg(number)).digest() for number in range(COUNT)]
    uids = [str(number) for number in range(COUNT - 1)] + ["9007199254740992"]
    records = [
        Record(f"{number}", jpeg(number), "alt", "web", uid=uid, sha256=shas[number].hex())
        for number, uid in enumerate(uids)
    ]
    write_shards(tmp_path / "images", records)
    floats = [float(uid) for uid in uids]
    floats[1] = 1.5
    hashes = [*shas[:27], shas[27].hex().upper().encode(), b"0" * 32, b"short"]
    rows = {"uid": floats, "sha256": hashes, "id": floats, "re": ["new"] * COUNT}
    parquet.write_table(
        pa.table({name: pa.array(values) for name, values in rows.items()}),
        tmp_path / "re.parquet",
    )
    for key, joined, details in (
        ("uid", 28, ["uid 1.5 has a fraction", "uid 9007199254740992.0 is a float of 2**53"]),
        ("id", 28, ["1.5", "id 9007199254740992.0 is a float of 2**53"]),
        ("sha256", 28, ["sha256 is 32 hexadecimal digits", "sha256 is 5 bytes"]),
    ):
        out = tmp_path / key
        manifest = make(
            tmp_path / "images", tmp_path / "re.parquet", out, "--join", key, "--caption-key", "re"
        )
        assert manifest["captions"]["joined"] == joined
        listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
        assert len(listed) == 2
        for detail in details:
            assert any(detail in reject["detail"] for reject in listed), (detail, listed)


def test_the_hash_of_laion_is_its_uid(tmp_path: Path) -> None:
    fields = {"hash": -4163, "punsafe": 0.1}
    assert pair_of("a", b"", "a dog", fields).uid == "-4163"
    assert pair_of("a", b"", "a dog", fields | {"uid": "u"}).uid == "u"
    assert pair_of("a", b"", "a dog", {"hash": "0f3a"}).uid is None, "of the file, not LAION's"
    assert pair_of("a", b"", "a dog", fields | {"hash": 1e17}).uid == "", "not exact"
    write_shards(
        tmp_path / "images",
        [Record(f"{n}", jpeg(n), "alt", "web", uid=f"{-n}") for n in range(COUNT)],
    )
    file = write_lines(
        tmp_path / "c.jsonl",
        [{"hash": -n, "similarity": 0.3, "re": "new"} for n in range(COUNT)],
    )
    manifest = make(
        tmp_path / "images", file, tmp_path / "out", "--join", "uid", "--caption-key", "re"
    )
    assert manifest["captions"]["joined"] == COUNT


@pytest.fixture
def joined(images: Path, tmp_path: Path) -> Path:
    file = write_lines(
        tmp_path / "c.jsonl", [{"uid": f"u{n}", "re": f"re {n}"} for n in range(0, COUNT, 2)]
    )
    make(images, file, tmp_path / "joined", "--join", "uid", "--caption-key", "re")
    return tmp_path / "joined"


@pytest.mark.parametrize("damage", ["index", "version", "shards", "plain"])
def test_an_overlay_of_other_images_is_refused(images: Path, joined: Path, damage: str) -> None:
    index = json.loads((joined / INDEX_NAME).read_text())
    message = "it was made for other images"
    if damage == "index":
        changed = json.loads((images / INDEX_NAME).read_text()) | {"more": 1}
        (images / INDEX_NAME).write_text(json.dumps(changed))
    elif damage == "version":
        index["overlay"]["version"], message = 2, "its version is 2"
    elif damage == "shards":
        del index["shards"][-1]
        message = "other numbers of samples"
    else:
        del index["overlay"]
        message = "it is not an overlay"
    (joined / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        captions_of(images, joined)


def test_captions_of_another_image_cost_their_sample_alone(images: Path, joined: Path) -> None:
    shard = sorted(joined.glob("*.mds"))[0]
    shard.write_bytes(shard.read_bytes().replace(b"i/2[", b"i/3[", 1))
    store = StreamStore(StreamRecipe("set", str(images), overlays=[str(joined)]))
    with pytest.raises(CorruptSample, match="captions of 'i/3'"):
        store.read(0, 2)
    assert store.read(0, 4)["captions"] == ["alt 4", "re 4"]


def test_a_stream_mixes_roles_of_an_overlay(
    images: Path, joined: Path, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_table, "CACHED_FROM", 1)  # as in sets of 1,000 shards
    recipe = StreamRecipe("set", str(images), overlays=[str(joined)], captions={"re": 1.0})
    batches = take(make_loader([recipe], global_batch=10), 3)
    pairs = [pair for b in batches for pair in zip(b.ids, b.captions, b.roles, strict=True)]
    assert ("i/4", "re 4", "re") in pairs and ("i/5", "alt 5", "caption") in pairs
    assert sum(batch.lacking for batch in batches) == COUNT // 2
    again = take(make_loader([recipe], global_batch=10), 3)
    assert [b.captions for b in again] == [b.captions for b in batches], "from cached tables"
    with pytest.raises(ValueError, match=r"role syn, but .* its roles are caption, re"):
        StreamStore(StreamRecipe("set", str(images), overlays=[str(joined)], captions={"syn": 1}))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server with the content of a folder; yields its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_remote_overlay_of_local_images_is_fetched_ahead(
    images: Path, joined: Path, tmp_path: Path
) -> None:
    with served(tmp_path) as root:
        store = StreamStore(StreamRecipe("set", str(images), overlays=[f"{root}/joined"]))
        sizes = store.fetched_bytes(np.arange(len(store.shards)))
        assert sizes.tolist() == [path.stat().st_size for path in sorted(joined.glob("*.mds"))]
        shape = StreamShape("set", tuple(store.shard_samples.tolist()), COUNT)
        prefetcher = Prefetcher([store], SampleOrder([shape], seed=1, block_samples=COUNT))
        prefetcher.advance(0, 0)
        deadline = time.monotonic() + 20
        while not all(map(store.is_cached, range(len(store.shards)))):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        prefetcher.close()
    assert store.read(0, 0)["captions"] == ["alt 0", "re 0"], "the server is gone"


def test_remote_overlays_are_fetched_and_prefetched(
    images: Path, joined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(tmp_path) as root:
        recipe = StreamRecipe(
            "set", str(tmp_path / "cache"), f"{root}/images", overlays=[f"{root}/joined"]
        )
        store = StreamStore(recipe)
        assert not store.is_cached(1)
        assert store.prefetch(1) and store.is_cached(1)
        assert store.overlays[0]._has(1) and not store.overlays[0]._has(0)
        assert store.read(0, 0)["captions"] == ["alt 0", "re 0"]
    entry = inventory([store])[0]
    assert entry["overlays"][0]["samples"] == COUNT
    assert show_shards.main([str(images), "--overlay", str(joined), "--count", "30"]) == 0
    assert "caption: alt 4 | re: re 4" in capsys.readouterr().out
    assert stream(images).overlays == []
