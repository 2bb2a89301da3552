"""Whole conversions: counts, equal bytes after interruptions, and errors that end them."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from data_samples import jpeg, stream
from odd_files import (
    BAD_IMAGES,
    GOOD_IMAGES,
    img2dataset_samples,
    members,
    write_img2dataset_tars,
    write_tar,
)

from blip_scale.data.captions import clean_caption
from blip_scale.data.conversion import locks
from blip_scale.data.conversion.pairs import Chunk, Found, RawPair, Source
from blip_scale.data.conversion.run import Conversion, Part, Progress, convert, merge
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.sources.readers import READERS

RULES = Rules("test")


def job_of(folder: Path, out: Path, **more: Any) -> Conversion:
    chunks = list(READERS["laion"].chunks(Source(str(folder))))
    return Conversion(chunks, str(out), RULES, **({"shard_bytes": 20_000, "workers": 2} | more))


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    store = StreamStore(stream(folder))
    by_id = {}
    for shard, count in enumerate(store.shard_samples):
        for sample in (store.read(shard, i) for i in range(count)):
            by_id[sample["id"]] = sample
    assert len(by_id) == sum(store.shard_samples), "ids are unique"
    return by_id


def rejects_of(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return [(fields["id"], fields["reason"]) for fields in map(json.loads, lines)]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six tars of 25 pairs."""
    folder = tmp_path_factory.mktemp("tars")
    write_img2dataset_tars(folder, 6, 25)
    return folder


@pytest.fixture(scope="module")
def whole(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a single process without interruptions."""
    folder = tmp_path_factory.mktemp("whole")
    convert(job_of(tars, folder, workers=1), Part())
    return folder


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> dict[str, bytes]:
    return files_of(whole)


def test_everything_arrives(whole: Path, undisturbed: dict[str, bytes]) -> None:
    written = samples_of(whole)
    expected = [sample for shard in range(6) for sample in img2dataset_samples(shard, 25)]
    assert list(written) == [key for key, _, _ in expected]
    for key, files, meta in expected:
        sample = written[key]
        assert sample == {
            "id": key, "image": files["jpg"], "source": "test", "width": 80, "height": 60,
            "captions": [f"picture {key}, a cat 😺 with a 👩‍👩‍👧 family"],
            "url": meta["url"], "similarity": 0.3125, "sha256": meta["sha256"],
        }  # fmt: skip
    shards = [name for name in undisturbed if name.startswith("shard.")]
    assert len(shards) > 6 and all(len(undisturbed[name]) <= 20_000 for name in shards)
    summary = json.loads(undisturbed["summary.json"])
    assert summary["pairs"] == {"read": 150, "written": 150, "rejected": 0}
    assert summary["shards"] == len(shards)
    assert summary["bytes"] == sum(len(undisturbed[name]) for name in shards)


def test_two_workers_give_the_same_bytes(
    tars: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    seen: list[Progress] = []
    convert(job_of(tars, tmp_path / "out"), Part(), seen.append)
    assert files_of(tmp_path / "out") == undisturbed
    assert seen[-1] == Progress(150, 0, 6, 6, 150)
    assert not list((tmp_path / "out").glob(".*")), "nothing is left lying"


def test_two_machines_give_the_same_bytes(
    tars: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    assert convert(job_of(tars, out), Part(1, 2)) is None
    assert not (out / "index.json").exists()
    with pytest.raises(ValueError, match=r"3 of 6 chunks are not converted yet .*number 0"):
        merge(str(out))
    assert convert(job_of(tars, out), Part(0, 2)) is not None, "the last part merges"
    assert files_of(out) == undisturbed
    (out / "index.json").unlink()
    merge(str(out))
    assert files_of(out) == undisturbed


def test_a_finished_set_is_left_as_it_is(
    tars: Path, whole: Path, undisturbed: dict[str, bytes]
) -> None:
    def fail(progress: Progress) -> None:
        raise AssertionError("converted again")

    convert(job_of(tars, whole), Part(), fail)
    assert files_of(whole) == undisturbed


@pytest.mark.multiprocess
def test_killed_again_and_again(tars: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Repeated kill -9 after a new chunk, until the conversion is done, gives the same bytes."""
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    job = job_of(tars, out, workers=2)
    slow = [replace(chunk, read=partial(_slowly, chunk.read)) for chunk in job.chunks]
    kills = 0
    while not (out / "index.json").exists() or (out / ".merging").exists():
        done = len(list(out.glob("chunks/*.json")))
        process = context.Process(
            target=convert, args=(Conversion(slow, job.out, RULES, 20_000, 2), Part())
        )
        process.start()
        workers: list[int] = []
        while process.is_alive() and len(list(out.glob("chunks/*.json"))) == done:
            workers = _children(process.pid) or workers
            time.sleep(0.01)
        time.sleep(0.1)  # let the workers reach the next chunks
        kills += process.is_alive()
        process.kill()
        process.join()
        if done < len(slow):  # otherwise only the merge was left, which has no workers
            _wait_for_end(workers)
    assert kills >= 2
    assert files_of(out) == undisturbed


def _slowly(read: partial[Iterator[Found]]) -> Iterator[Found]:
    for item in read():
        time.sleep(0.01)
        yield item


def _children(pid: int | None) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _is_running(pid: int) -> bool:
    """Whether a process has not ended. Some containers never reap one that lost its parent."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for_end(pids: list[int]) -> None:
    """Wait until the workers of a killed parent have ended by themselves."""
    assert pids
    until = time.monotonic() + 120
    while any(map(_is_running, pids)):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.01)


def test_read_is_written_and_rejected(tmp_path: Path) -> None:
    """One set has all odd cases, and a truncated tar."""
    texts = {"txt": b"a dog"}
    samples = [
        *((f"good-{i}", {"jpg": data} | texts) for i, data in enumerate(GOOD_IMAGES.values())),
        *((f"bad-{i}", {"jpg": data} | texts) for i, (data, _) in enumerate(BAD_IMAGES.values())),
        ("no-image", texts),
        ("no-text", {"jpg": jpeg(1)}),
        ("empty-text", {"jpg": jpeg(2), "txt": b"!!!"}),
        ("good-0", {"jpg": jpeg(3)} | texts),
        ("several", {"jpg": jpeg(4, (60, 50)), "json": b'{"captions": ["one", "", "two"]}'}),
    ]
    write_tar(tmp_path / "in" / "0.tar", members(*samples))
    cut = write_tar(
        tmp_path / "in" / "1.tar",
        members(*((key, files) for key, files, _ in img2dataset_samples(1, 6))),
    )
    cut.write_bytes(cut.read_bytes()[:20_000])
    summary = convert(job_of(tmp_path / "in", tmp_path / "out"), Part())
    assert summary is not None
    written = samples_of(tmp_path / "out")
    good = len(GOOD_IMAGES)
    assert [sample_id for sample_id in written if sample_id.startswith("good")] == [
        f"good-{i}" for i in range(good)
    ]
    assert written["several"]["captions"] == ["one", "two"]
    assert written["good-0"]["image"] == GOOD_IMAGES["jpeg"], "the first of two stays"
    named = rejects_of(tmp_path / "out")
    for i, (_, reason) in enumerate(BAD_IMAGES.values()):
        assert (f"bad-{i}", reason) in named
    for line in [
        ("no-image", "missing image"), ("no-text", "missing caption"), ("1.tar", "damaged input"),
        ("empty-text", "empty caption"), ("good-0", "duplicate id"), ("several", "empty caption"),
    ]:  # fmt: skip
        assert line in named
    for name in ("pairs", "captions"):
        counts = summary[name]
        assert counts["read"] == counts["written"] + counts["rejected"]
    assert summary["pairs"]["written"] == len(written)
    whole_pairs = [line for line in named if line[0] != "several"]
    assert summary["pairs"]["rejected"] == len(whole_pairs)
    assert summary["captions"]["written"] == sum(
        len(sample["captions"]) for sample in written.values()
    )
    assert sum(summary["rejects"].values()) == len(named)


def test_ids_of_other_chunks_are_dropped(tmp_path: Path) -> None:
    """The chunk with the lower number keeps the id, whichever was converted first."""
    first, second = img2dataset_samples(0, 30), img2dataset_samples(1, 30)
    twice = [(key, files | {"jpg": jpeg(7, (80, 60))}) for key, files, _ in first[3:12]]
    samples = [(key, files) for key, files, _ in second]
    write_tar(tmp_path / "in" / "0.tar", members(*((key, files) for key, files, _ in first)))
    write_tar(tmp_path / "in" / "1.tar", members(*samples[:20], *twice, *samples[20:]))
    write_tar(tmp_path / "in" / "2.tar", members(twice[0]))
    results = []
    for name, parts in (("a", [Part()]), ("b", [Part(2, 3), Part(1, 3), Part(0, 3)])):
        out = tmp_path / name
        summary = [convert(job_of(tmp_path / "in", out), part) for part in parts][-1]
        assert summary is not None
        assert summary["pairs"] == {"read": 70, "written": 60, "rejected": 10}
        assert summary["captions"] == {"read": 70, "written": 60, "rejected": 10}
        assert summary["rejects"] == {"duplicate id": 10}
        written = samples_of(out)
        assert sorted(written) == sorted(key for key, _, _ in first + second)
        assert all(written[key]["image"] == files["jpg"] for key, files, _ in first)
        named = json.loads((out / "index.json").read_text())["shards"]
        assert {path.name for path in out.glob("shard.*")} == {
            shard["raw_data"]["basename"] for shard in named
        }
        foreign, left_by_a_kill = out / "shard.txt", out / "shard.000002.00000.mds"
        for path in (foreign, left_by_a_kill):
            path.write_text("")
        merge(str(out))
        assert foreign.exists() and not left_by_a_kill.exists()
        foreign.unlink()
        results.append(files_of(out))
    assert results[0] == results[1]


def test_the_index_knows_how_many_captions_each_sample_has(tmp_path: Path) -> None:
    """Only written captions count, also if a chunk is written again without a duplicate."""
    texts = [["one"], ["two", "", "texts"], ["a", "b", "c"]] * 6
    pairs = [RawPair(f"{i}", jpeg(i, (80, 60)), captions) for i, captions in enumerate(texts)]
    chunks = [
        Chunk("single", partial(iter, [RawPair("s", jpeg(99, (80, 60)), "text")]), "1"),
        Chunk(
            "several",
            partial(iter, [*pairs[:5], RawPair("s", jpeg(99, (80, 60)), ["x", "y"]), *pairs[5:]]),
            "2",
        ),
    ]
    summary = convert(Conversion(chunks, str(tmp_path / "out"), RULES, 20_000), Part())
    assert summary is not None and summary["rejects"] == {"duplicate id": 1, "empty caption": 6}
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["captions"][0] is None and len(index["captions"]) == len(index["shards"]) > 2
    assert [n for part in index["captions"][1:] for n in part] == [1, 2, 3] * 6
    recipe = stream(tmp_path / "out", repeat="captions")
    assert sum(StreamStore(recipe).shard_items) == summary["captions"]["written"] == 37


def test_a_restart_must_be_the_same_job(tmp_path: Path) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    write_img2dataset_tars(tars, 6, 2)
    convert(job_of(tars, out), Part(0, 2))
    for changed in (
        Conversion(job_of(tars, out).chunks, str(out), Rules("test", max_words=40), 20_000),
        job_of(tars, out, shard_bytes=30_000),
    ):
        with pytest.raises(ValueError, match=r"(max_words|shard_size) was \d+ and is \d+"):
            convert(changed, Part(1, 2))
    write_tar(tars / "00005.tar", members(("a", {"jpg": jpeg(1), "txt": b"a dog"})))
    with pytest.raises(ValueError, match=r"content, size or time of what is in 00005\.tar has"):
        convert(job_of(tars, out), Part(1, 2))
    write_tar(tars / "00006.tar", members(("a", {"jpg": jpeg(1), "txt": b"a dog"})))
    with pytest.raises(ValueError, match="changed"):
        convert(job_of(tars, out), Part(1, 2))
    with pytest.raises(ValueError, match="--overwrite and --shard"):
        convert(job_of(tars, out), Part(1, 2), overwrite=True)
    assert convert(job_of(tars, out), Part(), overwrite=True) is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another set"):
        convert(job_of(tars, tmp_path / "other"), Part())
    with pytest.raises(FileNotFoundError, match="no conversion was started here"):
        merge(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="parts are counted from 0 to 1"):
        Part(2, 2)


def _failing(error: Exception, pairs: int) -> Iterator[Found]:
    for i in range(pairs):
        yield RawPair(f"{i}", jpeg(i, (80, 60)), "a dog")
    raise error


def test_an_error_keeps_what_is_finished(
    tars: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    job = job_of(tars, tmp_path / "out", workers=1)
    broken = partial(_failing, PermissionError(13, "no access", "5.jpg"), 10)
    chunks = [*job.chunks[:5], Chunk(job.chunks[5].name, broken, job.chunks[5].fingerprint)]
    with pytest.raises(PermissionError, match=r"no access: '5\.jpg'"):
        convert(Conversion(chunks, job.out, RULES, 20_000, 1), Part())
    assert len(list((tmp_path / "out" / "chunks").glob("*"))) == 5
    assert not list((tmp_path / "out").glob("shard.000005*"))
    convert(job, Part())
    assert files_of(tmp_path / "out") == undisturbed


def _die() -> Iterator[Found]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield RawPair("never", None, None)


def test_a_killed_worker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a worker was killed .*the same command continues"):
        convert(Conversion([Chunk("0", _die, "never read")], str(tmp_path / "out"), RULES), Part())


def _limited(read: partial[Iterator[Found]]) -> Iterator[Found]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return read()


def test_a_file_that_cannot_be_written(
    tars: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """The kernel refuses further writes, as on a full disk; the same call then resumes."""
    job = job_of(tars, tmp_path / "out", workers=1)
    chunks = list(job.chunks)
    chunks[2] = replace(chunks[2], read=partial(_limited, chunks[2].read))
    with pytest.raises(OSError, match="File too large"):
        convert(Conversion(chunks, job.out, RULES, 20_000, 1), Part())
    assert len(list((tmp_path / "out" / "chunks").glob("*"))) == 2
    assert not list((tmp_path / "out").glob("shard.000002*"))
    convert(job, Part())
    assert files_of(tmp_path / "out") == undisturbed


def test_nothing_good_at_all(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", members(("a", {"txt": b"a dog"})))
    summary = convert(job_of(tmp_path / "in", tmp_path / "out"), Part())
    assert summary is not None and summary["pairs"] == {"read": 1, "written": 0, "rejected": 1}
    with pytest.raises(ValueError, match="holds no sample"):
        samples_of(tmp_path / "out")


def _without_end() -> Iterator[Found]:
    time.sleep(600)
    yield RawPair("never", None, None)


@pytest.mark.multiprocess
def test_the_second_of_two_conversions_is_refused(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused while the first runs; another part may run. kill -9 frees the lock."""
    monkeypatch.setattr(locks, "_GRACE_S", 0.5)
    out = tmp_path / "out"
    job = job_of(tars, out, workers=1)
    endless = [Chunk(c.name, _without_end, c.fingerprint) for c in job.chunks]
    first = multiprocessing.get_context("fork").Process(
        target=convert, args=(Conversion(endless, str(out), RULES, 20_000, 1), Part(0, 2))
    )
    first.start()
    workers: list[int] = []
    while not workers:
        time.sleep(0.05)
        workers = _children(first.pid)
    for part in (Part(), Part(0, 2), Part(2, 4)):
        with pytest.raises(ValueError, match=rf"is writing here \(process {first.pid} on .*0/2"):
            convert(job, part)
    assert convert(job, Part(1, 2)) is None
    first.kill()
    first.join()
    _wait_for_end(workers)
    assert convert(job, Part()) is not None
    assert not list(out.glob(".*")), "nothing is left lying"


def _surprising(pairs: int) -> Iterator[Found]:
    yield from (RawPair(f"{i}", jpeg(i, (80, 60)), "a dog") for i in range(pairs))
    raise KeyError("a reader that did not expect this")


def test_a_record_cannot_end_the_conversion(tmp_path: Path) -> None:
    """Any fault of a record gives one reject, with at most 200 characters of its content."""
    image = jpeg(1, (80, 60))
    (tmp_path / "locked").mkdir()
    bad = [
        RawPair("half \ud83d", image, "a dog"), RawPair("url", image, "a dog", "http://\ud83d"),
        RawPair("null", f"{tmp_path}/a\0b.jpg", "a dog"), RawPair("folder", str(tmp_path), "a dog"),
        RawPair("x" * 5000, f"{tmp_path}/{'x' * 5000}", "a dog"),
        RawPair("answers", image, ["why"], annotations=[{"answers": ["\ud83d"]}]),
        RawPair("number", 7, "a dog"), RawPair("captions", image, [object()]),
    ]  # fmt: skip
    chunks = [
        Chunk("bad", partial(iter, bad), "1"),
        Chunk("surprise", partial(_surprising, 3), "2"),
        Chunk("good", partial(iter, [RawPair("good", image, "a dog\0 here")]), "3"),
    ]
    summary = convert(Conversion(chunks, str(tmp_path / "out"), RULES, workers=1), Part())
    assert summary is not None
    assert summary["pairs"] == {"read": 13, "written": 4, "rejected": 9}
    assert samples_of(tmp_path / "out")["good"]["captions"] == ["a dog here"]
    lines = [json.loads(x) for x in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert lines[-1]["id"] == "surprise, after 3 records"
    assert "KeyError" in lines[-1]["detail"] and lines[-1]["reason"] == "damaged input"
    assert all(len(x["id"]) <= 200 and len(x.get("detail", "")) <= 200 for x in lines)


def test_long_captions_end_at_a_sentence(tmp_path: Path) -> None:
    """A long caption is cut at a sentence end that fits, and the summary counts both cuts."""
    words = " ".join(f"w{i}" for i in range(20))
    texts = {
        "fits": f"{words}. And more.", "sentence": f"{words}. {words}", "none": f"{words}, {words}",
        "early": f"Dr. {words} {words}",
    }  # fmt: skip
    pairs = [RawPair(key, jpeg(1, (80, 60)), text) for key, text in texts.items()]
    chunks = [Chunk("all", partial(iter, pairs), "1")]
    summary = convert(Conversion(chunks, str(tmp_path / "out"), RULES, workers=1), Part())
    assert summary is not None
    captions = {key: sample["captions"][0] for key, sample in samples_of(tmp_path / "out").items()}
    assert captions["fits"] == f"{words} and more" and captions["sentence"] == words
    for key in ("none", "early"):
        assert captions[key] == clean_caption(texts[key]) and len(captions[key].split()) == 30
    assert summary["text"] == {"captions_cut": 3, "captions_cut_at_a_sentence": 1}
