"""`--holdout`: which pairs are held out, that nothing is lost, and what a kill does to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_samples import jpeg, stream

from blip_scale.commands import prepare_data
from blip_scale.config.recipe import DataRecipe
from blip_scale.data.conversion import holdout
from blip_scale.data.conversion import run as running
from blip_scale.data.conversion.holdout import choose, parse_holdout
from blip_scale.data.conversion.output import OutputFolder
from blip_scale.data.conversion.pairs import Chunk, RawPair
from blip_scale.data.conversion.run import Conversion, Part, convert, merge
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.reading.stream_store import StreamStore

PAIRS = 120


def pairs_of(count: int = PAIRS) -> list[RawPair]:
    """Pairs with two captions every third time; 110 to 119 repeat the images of 0 to 9, and 100 to
    104 are other images from the URLs of 10 to 14."""
    pairs = []
    for number in range(count):
        picture = number - 110 if number >= 110 else number
        url = f"https://host/{number - 90 if 100 <= number < 105 else number}"
        captions = [f"number {number}", "another"] if number % 3 == 0 else [f"number {number}"]
        pairs.append(RawPair(f"id{number}", jpeg(picture, (40, 40)), captions, url))
    return pairs


def job_of(
    out: Path | str, keep: int | float | None, sizes: Sequence[int] = (30, 30, 30, 30), **more: Any
) -> Conversion:
    """A conversion of `pairs_of` in chunks of some sizes, whose last chunk has an id twice and a
    broken image more."""
    pairs, chunks = pairs_of(), []
    for number, size in enumerate(sizes):
        part, pairs = pairs[:size], pairs[size:]
        if number == len(sizes) - 1:
            part += [RawPair("id0", jpeg(900, (40, 40)), "twice"), RawPair("bad", b"<html>", "x")]
        chunks.append(Chunk(str(number), partial(iter, part), str(number), len(part)))
    rules = Rules("test", holdout=keep)
    return Conversion(chunks, str(out), rules, **({"shard_bytes": 20_000} | more))


def ids_of(folder: Path) -> list[str]:
    return [sample["id"] for sample in samples_of(folder)]


def samples_of(folder: Path) -> list[dict[str, Any]]:
    store = StreamStore(stream(folder))
    places = [(n, i) for n, count in enumerate(store.shard_samples) for i in range(count)]
    return [store.read(*place) for place in places]


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", None), ("500", 500), ("1", 1), ("0.02", 0.02), ("2%", 0.02), ("0.3%", 0.003)],
)
def test_a_number_or_a_share(text: str, expected: int | float | None) -> None:
    parsed = parse_holdout(text)
    assert parsed == expected and type(parsed) is type(expected)


@pytest.mark.parametrize("text", ["0", "-5", "1.0", "100%", "many", "0%", "nan", "5 %x"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--holdout .*expected a number of pairs"):
        parse_holdout(text)


@pytest.mark.parametrize("keep", [12, 0.1])
def test_nothing_is_lost(tmp_path: Path, keep: int | float) -> None:
    summary = convert(job_of(tmp_path / "out", keep), Part())
    assert summary is not None
    assert summary["pairs"] == {"read": 122, "written": 108, "rejected": 2, "held_out": 12}
    for counts in (summary["pairs"], summary["captions"]):
        assert counts["read"] == counts["written"] + counts["held_out"] + counts["rejected"]
    train, held_out = samples_of(tmp_path / "out"), samples_of(tmp_path / "out" / "heldout")
    everything = {sample["id"]: sample for sample in train + held_out}
    assert len(train) == 108 and len(held_out) == 12 and len(everything) == PAIRS
    for pair in pairs_of():
        assert everything[pair.id]["image"] == pair.image
        assert everything[pair.id]["captions"] == pair.captions
    captions = sum(len(sample["captions"]) for sample in held_out)
    assert summary["captions"]["held_out"] == captions
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    names = {shard["raw_data"]["basename"] for shard in index["shards"]}
    assert {path.name for path in (tmp_path / "out").glob("shard.*")} == names
    repeated = StreamStore(stream(tmp_path / "out", repeat="captions"))
    assert sum(repeated.shard_items) == summary["captions"]["written"]


@pytest.mark.parametrize("keep", range(3, 60, 8))
def test_an_image_is_on_one_side(tmp_path: Path, keep: int) -> None:
    convert(job_of(tmp_path / "out", keep), Part())
    train, held_out = samples_of(tmp_path / "out"), samples_of(tmp_path / "out" / "heldout")
    for key in ("image", "url", "id"):
        assert not {sample[key] for sample in train} & {sample[key] for sample in held_out}, key
    assert keep - 1 <= len(held_out) <= keep


def test_the_choice_knows_no_order_workers_or_parts(tmp_path: Path) -> None:
    convert(job_of(tmp_path / "a", 20), Part())
    expected = sorted(ids_of(tmp_path / "a" / "heldout"))
    assert convert(job_of(tmp_path / "b", 20, workers=2), Part(1, 2)) is None
    convert(job_of(tmp_path / "b", 20), Part(0, 2))
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a"), "parts"
    convert(job_of(tmp_path / "c", 20, sizes=(7, 50, 1, 62)), Part())
    assert sorted(ids_of(tmp_path / "c" / "heldout")) == expected, "other chunks"
    merge(str(tmp_path / "a"))
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a"), "merged again"


def test_the_choice_is_a_fair_draw() -> None:
    """Every pair has the same chance, whether its image comes once or five times."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1, 2**63, 50_000, dtype=np.uint64)
    images = np.concatenate([np.arange(25_000), np.repeat(np.arange(25_000, 30_000), 5)])
    nothing = np.zeros(50_000, np.uint64)
    chosen = choose(ids, [(images + 1).astype(np.uint64), nothing], 0.1)
    assert len(chosen) == 5_000
    assert 2_300 < (chosen < 25_000).sum() < 2_700
    assert (np.bincount(images[chosen[chosen >= 25_000]])[25_000:] % 5 == 0).all()


def test_images_hang_together_over_both_keys() -> None:
    """a and b share an image, b and c a URL: all three on one side."""
    ids = np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 >> 8)
    images = np.array([5, 5, 6, 7, 8, 9], np.uint64)
    urls = np.array([0, 1, 1, 0, 0, 0], np.uint64)
    for keep in range(1, 6):
        chosen = set(choose(ids, [images, urls], keep).tolist())
        assert len(chosen & {0, 1, 2}) in (0, 3)


@pytest.mark.parametrize("keep", [120, 5000, 0.9999, 0.001])
def test_all_or_none_is_refused(tmp_path: Path, keep: int | float) -> None:
    with pytest.raises(ValueError, match=r"--holdout"):
        convert(job_of(tmp_path / "out", keep), Part())
    assert not (tmp_path / "out" / "index.json").exists()


def test_it_is_part_of_the_conversion(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(job_of(out, 10), Part())
    for keep, change in ((11, "is 11"), (None, "is None")):
        with pytest.raises(ValueError, match=f"holdout was 10 and {change}"):
            convert(job_of(out, keep), Part())
    convert(job_of(out, None), Part(), overwrite=True)
    assert not list((out / "heldout").glob("*")) and len(ids_of(out)) == PAIRS
    convert(job_of(out, 10), Part(), overwrite=True)
    assert len(ids_of(out / "heldout")) == 10


def test_a_foreign_heldout_set_is_left_alone(tmp_path: Path) -> None:
    convert(job_of(tmp_path / "out" / "heldout", None), Part())
    with pytest.raises(ValueError, match="holds another set"):
        convert(job_of(tmp_path / "out", 10), Part())


def test_a_heldout_set_that_was_removed_is_named(tmp_path: Path) -> None:
    """Another choice from the pairs that are left would hold out pairs twice."""
    out = tmp_path / "out"
    convert(job_of(out, 20), Part())
    (out / "heldout" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"heldout/index\.json was not there.*--overwrite"):
        merge(str(out))


def test_a_chunk_that_is_converted_again_gives_its_pairs_up_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(job_of(out, 20), Part())
    before = set(ids_of(out))
    for number in (0, 3):
        (out / "chunks" / f"00000{number}.json").unlink()
        convert(job_of(out, 20), Part())
        assert set(ids_of(out)) == before


def _convert_and_die(job: Conversion, call: int, after: bool) -> None:
    """Convert; kill this process at a call of `put`, before or after it."""
    put: Callable[..., None] = OutputFolder.put
    calls = 0

    def deadly(self: OutputFolder, folder: Path, names: Sequence[str]) -> None:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == call:
            put(self, folder, names[: len(names) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, folder, names)

    OutputFolder.put = deadly  # type: ignore[method-assign]
    convert(job, Part())


@pytest.mark.multiprocess
def test_a_kill_at_any_moment_of_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(job_of(tmp_path / "whole", 12), Part())
    undisturbed = files_of(tmp_path / "whole")

    def stop(*arguments: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(running, "merge_chunks", stop)
        convert(job_of(tmp_path / "chunks", 12), Part())
    killed = 0
    for call in range(1, 20):
        for after in (False, True):
            out = tmp_path / f"out{call}{after}"
            shutil.copytree(tmp_path / "chunks", out)
            process = multiprocessing.get_context("fork").Process(
                target=_convert_and_die, args=(job_of(out, 12), call, after)
            )
            process.start()
            process.join(60)
            killed += process.exitcode == -signal.SIGKILL
            convert(job_of(out, 12), Part())
            files = {name: data for name, data in files_of(out).items() if ".making" not in name}
            assert files == undisturbed, f"killed at put {call}"
            shutil.rmtree(out)
        if process.exitcode == 0:
            break
    assert killed >= 10


def test_the_command_tells_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(jpeg(number, (40, 40)))
        (tmp_path / "in" / f"{number}.txt").write_text(f"number {number}")
    out = tmp_path / "out"
    arguments = ["folder", str(tmp_path / "in"), str(out), "--workers", "1", "--label", "mine"]
    assert prepare_data.main([*arguments, "--tokenizer", "/nowhere", "--holdout", "20%"]) == 0
    shown = capsys.readouterr().out
    assert "pairs: 30 read = 24 written + 6 held out + 0 rejected" in shown
    hint = yaml.safe_load(shown.partition("recipe:\n")[2])
    assert hint == {"data": {"heldout": [{"name": "mine", "local": f"{out}/heldout"}]}}
    assert set(hint["data"]) <= set(DataRecipe.__dataclass_fields__)
    assert prepare_data.main([*arguments, "--holdout", "all"]) == 2
    assert "--holdout all" in capsys.readouterr().err


def test_the_seed_is_fixed() -> None:
    """Another release must hold out the same pairs."""
    ids = np.arange(1000, dtype=np.uint64)
    chosen = choose(ids, [np.zeros(1000, np.uint64)], 5)
    assert holdout.parse_holdout("5") == 5
    assert chosen.tolist() == CHOSEN


CHOSEN = [297, 391, 841, 958, 960]
