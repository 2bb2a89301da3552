"""CapFilt of a set of drawings: what is kept, the same bytes whatever happens on the way, and what
is refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from blip_scale.commands import capfilt
from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.mds import INDEX_NAME
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import Record, write_shards
from blip_scale.inference.blip import draws_of
from blip_scale.inference.images import pixels_of
from blip_scale.inference.loading import load_blip
from blip_scale.model.generation import NucleusSettings

SAMPLING = ["--max-tokens", "10", "--min-tokens", "4"]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 drawings in several shards; every third has two captions, and one can't be decoded."""
    folder = tmp_path_factory.mktemp("web") / "web"
    drawings = tiny_runs.records("web")
    records = list(drawings)
    for i in range(0, len(records), 3):
        records[i] = replace(records[i], caption=[records[i].caption, "a big cross"])
    records[20] = Record("broken", records[20].image[:60], "a disc", "web")
    write_shards(folder, records, shard_size="4kb")
    return folder


def run(web: Path, out: Path, *more: str, code: int = 0, model: Path | None = None) -> Path:
    """The command, on one CPU process."""
    models = ["--captioner", str(model), "--filter", str(model)] if model else []
    common = [*SAMPLING, "--workers", "1", "--device", "cpu", "--batch-size", "5"]
    assert capfilt.main([str(web), str(out), *models, *common, *more]) == code
    return out


@pytest.fixture(scope="module")
def whole(web: Path, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes in one go, with captioner and filter of two folders."""
    out = tmp_path_factory.mktemp("whole") / "out"
    models = ["--captioner", str(hf / "captioning"), "--filter", str(hf / "retrieval")]
    return run(web, out, *models)


@pytest.fixture(scope="module")
def models(hf: Path) -> list[str]:
    return ["--captioner", str(hf / "captioning"), "--filter", str(hf / "retrieval")]


def samples_of(folder: Path) -> list[dict[str, Any]]:
    store = StreamStore(StreamRecipe("set", str(folder)))
    samples = []
    for shard, count in enumerate(store.shard_samples):
        samples += [store.read(shard, index) for index in range(count)]
    return samples


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def expected(web: Path, hf: Path) -> dict[str, list[tuple[str, str, float]]]:
    """(kind, text, score) of every sample by its id: each image alone, and matched by
    transformers."""
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    captioner = load_blip(hf / "captioning")
    reference = BlipForImageTextRetrieval.from_pretrained(hf / "retrieval")
    processor = BlipProcessor.from_pretrained(hf / "retrieval")
    sampling = NucleusSettings(max_length=10, min_length=4)
    expected_scores = {}
    for sample in samples_of(web):
        if sample["id"] == "broken":
            continue
        embeds = captioner.image_embeds(pixels_of(sample["image"], 32)[None])
        draws = draws_of([sample["id"]], 0, 10)
        written = captioner.captions(embeds, sampling, draws=draws)[0]
        texts = [*(("web", text) for text in sample["captions"]), ("synthetic", written)]
        image = decode_image(sample["image"])
        expected_scores[sample["id"]] = []
        for kind, text in texts:
            inputs = processor(image, text, return_tensors="pt")
            inputs["input_ids"][:, 0] = reference.config.text_config.enc_token_id
            with torch.no_grad():
                score = reference(**inputs).itm_score.softmax(-1)[0, 1].item()
            expected_scores[sample["id"]].append((kind, text, score))
    return expected_scores


def test_what_matches_is_kept_and_says_where_it_is_from(
    web: Path, whole: Path, expected: dict[str, list[tuple[str, str, float]]]
) -> None:
    before = {sample["id"]: sample for sample in samples_of(web)}
    written = {sample["id"]: sample for sample in samples_of(whole)}
    prints = set()
    for name, scored in expected.items():
        kept = [entry for entry in scored if entry[2] >= 0.5]
        assert (name in written) == bool(kept)
        if not kept:
            continue
        sample = written[name]
        assert sample["captions"] == [text for _, text, _ in kept]
        for origin, (kind, _, score) in zip(sample["annotations"], kept, strict=True):
            assert origin["kind"] == kind
            assert origin["score"] == pytest.approx(score, abs=1e-4)
            assert ("captioner" in origin) == (kind == "synthetic")
            prints.add((origin["filter"], origin.get("captioner")))
        same = ("image", "source", "width", "height", "url")
        assert {key: sample[key] for key in same} == {key: before[name][key] for key in same}
    assert len(prints) == 2 and all(len(mark) == 16 for mark, _ in prints)
    assert 5 < len(written) < 64
    kinds = Counter(o["kind"] for s in written.values() for o in s["annotations"])
    assert min(kinds.values()) > 5 and len(kinds) == 2


def test_everything_is_counted(
    whole: Path, expected: dict[str, list[tuple[str, str, float]]]
) -> None:
    statistics = json.loads((whole / "statistics.json").read_text())
    scored = list(chain.from_iterable(expected.values()))
    for kind in ("web", "synthetic"):
        scores = [score for origin, _, score in scored if origin == kind]
        kept = sum(score >= 0.5 for score in scores)
        counts = statistics[kind]
        assert (counts["read"], counts["kept"]) == (len(scores), kept)
        assert counts["dropped"] == len(scores) - kept
        assert sum(counts["score_histogram"]) == len(scores)
        assert sum(counts["score_histogram"][10:]) == kept
    assert statistics["images"]["read"] == 64 and statistics["undecodable_images"] == 1
    assert statistics["settings"]["threshold"] == 0.5
    rejects = [json.loads(line) for line in (whole / "rejects.jsonl").read_text().splitlines()]
    reasons = Counter(reject["reason"] for reject in rejects)
    assert reasons["web caption doesn't match"] == statistics["web"]["dropped"]
    assert reasons["undecodable"] == 1
    dropped = [text for _, text, score in scored if score < 0.5]
    unmatched = [reject for reject in rejects if reject["reason"] != "undecodable"]
    texts = [reject["detail"].split(" ", 1)[1] for reject in unmatched]
    assert sorted(texts) == sorted(dropped)


def test_the_sheet_shows_what_was_done(whole: Path) -> None:
    page = (whole / "samples.html").read_text()
    assert page.count('<div class="card">') == 48
    assert page.count("data:image/jpeg;base64,") >= 47
    rejects = [json.loads(line) for line in (whole / "rejects.jsonl").read_text().splitlines()]
    assert page.count('class="text"') > 5 and 5 < page.count("text dropped") <= len(rejects)


@pytest.mark.multiprocess
def test_pretraining_reads_each_caption_once(whole: Path) -> None:
    store = StreamStore(StreamRecipe("clean", str(whole), repeat="captions"))
    assert sum(store.shard_items) == sum(len(sample["captions"]) for sample in samples_of(whole))
    folder = whole.parent / "run"
    folder.mkdir()
    recipe = tiny_runs.make_recipe(
        folder,
        data={"streams": [{"name": "clean", "local": str(whole), "repeat": "captions"}]},
        train={"max_steps": 2},
    )
    tiny_runs.train(recipe)
    assert set(tiny_runs.losses(folder / "run")) == {1, 2}


@pytest.mark.multiprocess
def test_a_run_that_was_fine_tuned_says_its_prompt(tmp_path: Path) -> None:
    """Loaded by its folder alone, and captions begin as it was trained; it can't match."""
    prompt = "a big "
    recipe = tiny_runs.make_recipe(
        tmp_path, task="captioning", model={"text": {"prompt": prompt}}, train={"max_steps": 1}
    )
    tiny_runs.train(recipe)
    blip = load_blip(tmp_path / "run")
    assert (blip.head, blip.prompt, blip.image_size) == ("captioning", prompt, 32)
    assert len(blip.prompt_ids(prompt)) == 3
    embeds = blip.image_embeds(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    sampling = NucleusSettings(max_length=8, min_length=5)
    draws = draws_of(["a", "b"], 0, 8)
    captions = blip.captions(embeds, sampling, draws=draws)
    assert captions == blip.captions(embeds, sampling, prompt, draws)
    assert captions != blip.captions(embeds, sampling, "", draws)
    with pytest.raises(ValueError, match="is a captioning checkpoint; match takes one of"):
        blip.match(embeds, ["a"], [0])


def test_other_processes_and_machines_give_the_same_bytes(
    web: Path, whole: Path, models: list[str], tmp_path: Path
) -> None:
    """Two processes; two parts, the second first; a merge that comes again."""
    undisturbed = files_of(whole)
    assert files_of(run(web, tmp_path / "two", *models, "--workers", "2")) == undisturbed
    parts = tmp_path / "parts"
    run(web, parts, *models, "--shard", "1/2")
    assert not (parts / INDEX_NAME).exists() and not (parts / "statistics.json").exists()
    run(web, parts, *models, "--shard", "0/2")
    assert files_of(parts) == undisturbed
    for name in ("statistics.json", "samples.html", INDEX_NAME):
        (parts / name).unlink()
    run(web, parts, *models, "--shard", "1/2")
    assert files_of(parts) == undisturbed


@pytest.mark.multiprocess
def test_killed_again_and_again(web: Path, whole: Path, models: list[str], tmp_path: Path) -> None:
    """kill -9 after each new shard, until there is nothing left to do: the same bytes."""
    out, kills = tmp_path / "out", 0
    context = multiprocessing.get_context("fork")
    while not (out / "statistics.json").exists():
        done = len(list(out.glob("chunks/*.json")))
        process = context.Process(target=run, args=(web, out, *models))
        process.start()
        while process.is_alive() and len(list(out.glob("chunks/*.json"))) == done:
            time.sleep(0.005)
        kills += process.is_alive()
        process.kill()
        process.join()
        time.sleep(0.3)  # its workers end by themselves
    assert kills >= 3
    assert files_of(out) == files_of(whole)


def test_what_was_begun_goes_on_as_it_was_begun(
    web: Path, models: list[str], ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(web, tmp_path / "out", *models, "--shard", "0/2")
    capsys.readouterr()
    changes = (["--threshold", "0.4"], ["--seed", "1"], ["--top-p", "0.8"], ["--prompt", "a"])
    for more in changes:
        run(web, tmp_path / "out", *models, "--shard", "1/2", *more, code=2)
        assert "was started with other input or options" in capsys.readouterr().err
    run(web, tmp_path / "out", "--shard", "1/2", model=ours, code=2)  # same weights, another head
    assert "was started with other input or options" in capsys.readouterr().err


def test_wrong_checkpoints_are_refused(
    web: Path, hf: Path, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(hf / "captioning", cut)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for captioner, judge, message in (
        (hf / "retrieval", ours, "is a retrieval checkpoint; caption takes one of: pretrain"),
        (ours, hf / "captioning", "is a captioning checkpoint; match takes one of: pretrain"),
        (hf / "vqa", ours, "is a vqa checkpoint; caption takes one of"),
        (cut, ours, "damaged or unsafe weights"),
        (tmp_path / "nowhere", ours, "nowhere: no such file or folder"),
    ):
        models = ["--captioner", str(captioner), "--filter", str(judge)]
        run(web, tmp_path / "out", *models, code=2)
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("capfilt.py: ") and message in line
    assert not (tmp_path / "out").exists()
    models = ["--captioner", str(ours), "--filter", str(ours)]
    run(tmp_path, tmp_path / "out", *models, code=2)
    assert "no index.json in" in capsys.readouterr().err
    run(web, tmp_path / "out", *models, "--threshold", "50", code=2)
    assert "a probability from 0 to 1" in capsys.readouterr().err


def test_an_overlay_has_the_kept_captions_in_place(
    web: Path, models: list[str], whole: Path, tmp_path: Path
) -> None:
    out = run(web, tmp_path / "out", *models, "--as", "overlay")
    kept = {sample["id"]: sample for sample in samples_of(whole)}
    store = StreamStore(StreamRecipe("web", str(web), overlays=[str(out)]))
    for place in store.places(range(store.samples)):
        sample = store.read(*place)
        added = [number for number, role in enumerate(sample["roles"]) if role != "caption"]
        expected = kept.get(sample["id"], {"captions": [], "annotations": []})
        assert [sample["captions"][number] for number in added] == expected["captions"]
        kinds = [origin["kind"] for origin in expected["annotations"]]
        assert [sample["roles"][number] for number in added] == kinds
    shards = json.loads((out / "index.json").read_text())["shards"]
    assert not any("image" in shard["column_names"] for shard in shards)
    assert (out / "samples.html").is_file()
