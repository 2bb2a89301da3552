"""Captions of several roles: stored by name, mixed by share, cut at whole sentences."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_samples import MakeLoader, MakeShards, jpeg, stream, take
from odd_files import members, write_tar
from pyarrow import parquet

from blip_scale.commands import prepare_data, show_shards
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.captions import clean_caption, parse_roles, whole_sentences
from blip_scale.data.conversion.pairs import RawPair, Source
from blip_scale.data.heldout.pairs import heldout_pairs
from blip_scale.data.loading.caption_mixture import CaptionMixture
from blip_scale.data.loading.micro_batches import CaptionInput
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.reading.stream_store import CorruptSample, StreamStore
from blip_scale.data.shards import Record, write_shards
from blip_scale.data.sources.readers import READERS

LONG = "A Dog runs. Dr. Smith's cat sleeps on a mat! Is it warm? Yes."


def write_roles(folder: Path, count: int = 40, lacking: int = 4) -> Path:
    """A set in which every sample has two `alt` texts and, but for every `lacking`-th, one `re`."""

    def record(number: int) -> Record:
        captions = {f"alt {number} a": "alt", f"alt {number} b": "alt"}
        if number % lacking:
            captions[f"re {number}"] = "re"
        return Record(
            f"{folder.name}-{number}", jpeg(number), [*captions], folder.name,
            roles=[*captions.values()],
        )  # fmt: skip

    write_shards(folder, map(record, range(count)), shard_size="20kb")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_roles(tmp_path / "set")


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    store = StreamStore(stream(folder))
    places = store.places(range(store.samples))
    return {sample["id"]: sample for sample in (store.read(*place) for place in places)}


@pytest.mark.parametrize(
    ("keys", "pairs"),
    [
        ("re_caption", [("re_caption", "re_caption")]),
        ("alt=TEXT, syn_text[]", [("alt", "TEXT"), ("syn_text", "syn_text")]),
    ],
)
def test_keys_name_their_roles(keys: str, pairs: list[tuple[str, str]]) -> None:
    assert parse_roles(keys) == pairs


@pytest.mark.parametrize("keys", ["", "a,,b", "=TEXT", "alt="])
def test_roles_without_a_name_are_refused(
    keys: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    arguments = ["webdataset", str(tmp_path / "in"), str(tmp_path / "out"), "--caption-key", keys]
    assert not keys or prepare_data.main(arguments) == 2
    with pytest.raises(ValueError, match="expected KEY or ROLE=KEY"):
        parse_roles(keys)


def test_conversion_keeps_roles_uids_and_hashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = [
        {"re": LONG, "syn": ["one", ["two", 7]], "uid": "u0", "sha256": "00ff"},
        {"re": None, "syn": [], "uid": None, "sha256": 3},
        {"syn": {"raw": "three"}},
    ]
    samples = []
    for number, entry in enumerate(fields):
        parts = {
            "jpg": jpeg(number, (64, 48)),
            "txt": b"alt text",
            "json": json.dumps(entry).encode(),
        }
        samples.append((str(number), parts))
    write_tar(tmp_path / "in.tar", members(*samples))
    keys = ["--caption-key", "re,syn[]", "--caption-key", "alt=txt,none"]
    out = tmp_path / "out"
    arguments = [
        "webdataset",
        str(tmp_path / "in.tar"),
        str(out),
        *keys,
        "--raw-captions",
        "--sha256",
    ]
    assert prepare_data.main([*arguments, "--workers", "1"]) == 0
    assert "captions by role: 3 alt, 0 none, 1 re, 3 syn" in capsys.readouterr().out
    first, second, third = samples_of(out).values()
    assert list(zip(first["roles"], first["captions"], strict=True)) == [
        ("re", LONG), ("syn", "one"), ("syn", "two"), ("alt", "alt text"),
    ]  # fmt: skip
    assert (first["uid"], second["uid"], third["uid"]) == ("u0", "", "")
    assert first["sha256"] == "00ff" and len(second["sha256"]) == 64
    summary = json.loads((out / "summary.json").read_text())
    assert summary["roles"] == {"alt": 3, "re": 1, "syn": 3}
    assert summary["rejects"] == {"caption is no text": 1}
    assert json.loads((out / INDEX_NAME).read_text())["caption_roles"] == summary["roles"]
    assert show_shards.main([str(out)]) == 0
    shown = capsys.readouterr().out
    assert "syn: three | alt: alt text" in shown and "7 captions of the roles alt, re, syn" in shown


def test_columns_of_parquet_become_roles(tmp_path: Path) -> None:
    rows = [
        {"jpg": jpeg(0), "key": "0", "re_caption": "Re.", "TEXT": "alt", "syn_text": ["s", "t"],
         "uid": "u", "sha256": "00"},
        {"jpg": jpeg(1), "key": "1", "re_caption": None, "TEXT": "alt", "syn_text": None,
         "uid": None, "sha256": None},
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = Source(str(tmp_path), caption_key="re_caption,alt=TEXT,syn_text[]")
    first, second = next(iter(READERS["laion"].chunks(source))).read()
    assert isinstance(first, RawPair) and isinstance(second, RawPair)
    assert first.captions == [
        ("re_caption", "Re."),
        ("alt", "alt"),
        *(("syn_text", t) for t in "st"),
    ]
    assert second.captions == [("alt", "alt")]
    assert (first.uid, first.sha256, second.uid, second.sha256) == ("u", "00", "", "")


def test_a_mixture_has_its_shares_exactly() -> None:
    mixture = CaptionMixture({"re": 0.75, "alt": 0.25}, 1, "set")
    roles = ["alt", "alt", "re"]
    for shard, passing in ((0, 0), (7, 3)):
        draws = [mixture.draw(roles, shard, index, passing) for index in range(1000)]
        counts = Counter(draws)
        assert abs(counts[2] - 750) <= 4
        assert abs(counts[0] - 125) <= 4 and abs(counts[1] - 125) <= 4
    passes = [mixture.draw(roles, 5, 9, passing) for passing in range(40)]
    assert abs(passes.count(2) - 30) <= 2
    assert {mixture.draw(["alt", "re"], 0, i, 0) for i in range(9)} == {0, 1}
    other = CaptionMixture({"re": 0.75, "alt": 0.25}, 2, "set")
    assert draws != [other.draw(roles, 7, index, 3) for index in range(1000)]


def test_a_missing_role_leaves_its_share_to_the_others_in_proportion() -> None:
    mixture = CaptionMixture({"re": 0.5, "alt": 0.3, "syn": 0.2, "off": 0.0}, 1, "set")
    draws = Counter(mixture.draw(["syn", "off", "alt"], 0, index, 0) for index in range(1000))
    assert abs(draws[2] - 600) <= 4 and draws[1] == 0
    none = Counter(mixture.draw(["x", "y"], 0, index, 0) for index in range(1000))
    assert abs(none[0] - 500) <= 4
    assert mixture.is_lacking(["re", "alt"]) and not mixture.is_lacking(["syn", "alt", "re"])


def test_the_mixture_is_the_same_for_any_ranks_workers_and_at_a_resume(
    folder: Path, make_loader: MakeLoader
) -> None:
    streams = [StreamRecipe("set", str(folder), captions={"re": 0.5, "alt": 0.5})]
    whole = take(make_loader(streams), 10)
    expected = [pair for batch in whole for pair in zip(batch.ids, batch.captions, strict=True)]
    ranks = [take(make_loader(streams, rank, 2, workers=rank), 10) for rank in range(2)]
    split = []
    for batches in zip(*ranks, strict=True):
        for batch in batches:
            split += zip(batch.ids, batch.captions, strict=True)
    assert split == expected
    first = make_loader(streams)
    take(first, 4)
    second = make_loader(streams)
    second.load_state_dict(first.state_dict())
    resumed = [caption for batch in take(second, 6) for caption in batch.captions]
    assert resumed == [caption for _, caption in expected[32:]]
    loader = make_loader(streams)
    lacking = sum(batch.lacking for batch in whole[:5])
    assert lacking == 10, "every fourth of 40 samples"
    shares = [loader.caption_shares(batch) for batch in whole[:5]]
    assert sum(share["data/share_set_re"] for share in shares) / 5 == pytest.approx(0.375, abs=0.05)
    assert sum(share["data/share_lacking_role"] for share in shares) / 5 == 0.25


def test_sets_without_roles_read_as_one_role(make_shards: MakeShards) -> None:
    folder = make_shards("old", 9)
    store = StreamStore(stream(folder))
    assert store.roles == ["caption"] and "roles" not in store.read(0, 0)
    StreamStore(StreamRecipe("old", str(folder), captions={"caption": 1.0}))
    with pytest.raises(ValueError, match=r"role re, but .* its roles are caption"):
        StreamStore(StreamRecipe("old", str(folder), captions={"caption": 1, "re": 2, "no": 0}))


def test_held_out_sets_keep_the_named_roles(folder: Path) -> None:
    pairs = heldout_pairs(StreamRecipe("set", str(folder), captions={"re": 1.0}), 16)
    assert pairs.captions[1] == ["re 1"]
    assert pairs.captions[0] == ["alt 0 a", "alt 0 b"], "it has no other"


def test_roles_that_do_not_fit_cost_their_sample_alone(tmp_path: Path) -> None:
    folder = write_roles(tmp_path / "odd", 3)
    shard = next(folder.glob("*.mds"))
    content = shard.read_bytes()
    assert content.count(b'["alt", "alt", "re"]') == 2
    shard.write_bytes(content.replace(b'["alt", "alt", "re"]', b'["alt", "alt", 123 ]', 1))
    store = StreamStore(stream(folder))
    with pytest.raises(CorruptSample, match="roles"):
        store.read(0, 1)
    assert store.read(0, 2)["roles"] == ["alt", "alt", "re"]


@pytest.mark.parametrize("damage", [[], {"re": 0}, {"re": "many"}, {"re": True}, 7])
def test_an_index_with_odd_roles_is_refused(folder: Path, damage: object) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["caption_roles"] == {"alt": 80, "re": 30}
    (folder / INDEX_NAME).write_text(json.dumps(index | {"caption_roles": damage}))
    with pytest.raises(ValueError, match="caption_roles"):
        StreamStore(stream(folder))


@pytest.mark.parametrize(
    ("words", "cut"),
    [
        (3, "a dog runs"),
        (9, "a dog runs"),
        (10, "a dog runs dr smith's cat sleeps on a mat"),
        (14, "a dog runs dr smith's cat sleeps on a mat is it warm? yes"),
        (2, ""),
    ],
)
def test_whole_sentences(words: int, cut: str) -> None:
    assert whole_sentences(LONG, lambda text: len(text.split()) <= words) == cut


def test_a_caption_ends_at_a_sentence_that_fits_words_and_tokens(text: CaptionInput) -> None:
    published = CaptionInput(text.tokenizer, max_tokens=8, max_words=10)
    whole = CaptionInput(text.tokenizer, max_tokens=8, max_words=10, whole_sentences=True)
    caption = "A pair, a pair. A pair. A a a."
    assert published.fitted(caption) == "a pair, a pair a pair a a a"
    assert whole.fitted(caption) == "a pair, a pair", "7 tokens; with the second sentence 9"
    assert whole.is_cut(caption, whole.fitted(caption), 7)
    assert not whole.is_cut("A pair.", whole.fitted("A pair."), 4)
    endless = "a pair " * 9
    assert whole.fitted(endless) == published.fitted(endless) == clean_caption(endless, 10)
    assert published.is_cut(endless, published.fitted(endless), 8)
    assert published.is_cut("a " * 7, "a " * 7, 8) and not published.is_cut("a " * 6, "a " * 6, 8)


def test_samples_outside_the_mixture_are_counted_and_told_once(
    folder: Path, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make_loader([StreamRecipe("set", str(folder), captions={"re": 1.0, "alt": 0.0})])
    shares = [loader.caption_shares(batch) for batch in take(loader, 5)]
    outside = [share["data/share_outside_mixture"] for share in shares]
    assert sum(outside) / 5 == 0.25, "every fourth of 40 samples has no `re`"
    assert caplog.text.count("without a caption of the roles re") == 1


def test_cut_captions_are_counted(tmp_path: Path, make_loader: MakeLoader) -> None:
    texts = ["a pair", "a a a a a a a", "a " * 31, "a a a a a a"]
    records = [Record(f"{i}", jpeg(i), texts[i % 4], "set") for i in range(8)]
    write_shards(tmp_path / "set", records)
    loader = make_loader([stream(tmp_path / "set")])
    batch = take(loader, 1)[0]
    assert batch.cut == 4
    assert loader.caption_shares(batch) == {"data/share_cut_captions": 0.5}
