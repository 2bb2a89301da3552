"""Samples that an epoch takes from each stream, and captions that an image gives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from data_samples import MakeLoader, MakeShards, jpeg, stream, take

from blip_scale.config.recipe import DataRecipe, StreamRecipe
from blip_scale.data.loading.micro_batches import Batch
from blip_scale.data.loading.mixing import describe, samples_per_epoch
from blip_scale.data.shards import Record, write_shards


def mixture(*settings: dict[str, float], samples: int | None = None) -> DataRecipe:
    streams = [StreamRecipe(f"s{i}", "folder", **s) for i, s in enumerate(settings)]  # type: ignore[arg-type]
    return DataRecipe(streams=streams, samples_per_epoch=samples)


def test_repeats_and_sizes() -> None:
    data = mixture({}, {"repeat": 5}, {"repeat": 0.2}, {"samples_per_epoch": 77})
    assert samples_per_epoch(data, [30, 30, 30, 30]) == [30, 150, 6, 77]


def test_weights_share_out_an_epoch_to_the_last_sample() -> None:
    data = mixture({"weight": 1}, {"weight": 1}, {"weight": 1}, {"weight": 7}, samples=1003)
    counts = samples_per_epoch(data, [10, 1000, 50, 50])
    assert sum(counts) == 1003
    assert [round(count / 1003, 2) for count in counts] == [0.1, 0.1, 0.1, 0.7]


def test_a_stream_that_is_never_read_is_refused() -> None:
    with pytest.raises(ValueError, match="stream 's1': an epoch takes none of its 40 samples"):
        samples_per_epoch(mixture({}, {"repeat": 0.01}), [10, 40])


def test_the_mixture_is_said_in_a_line() -> None:
    data = mixture({}, {"repeat": 3})
    assert describe(data, [100, 100], [100, 300]) == (
        "s0 25.0% (100 = 1 x 100), s1 75.0% (300 = 3 x 100)"
    )


def test_an_epoch_holds_what_the_recipe_says(
    make_shards: MakeShards, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    streams = [
        stream(make_shards("red", 20), weight=1.0),
        stream(make_shards("blue", 60), weight=3.0),
    ]
    loader = make_loader(streams, samples_per_epoch=40)
    assert (
        "an epoch of 40 pairs: red 25.0% (10 = 0.5 x 20), blue 75.0% (30 = 0.5 x 60)" in caplog.text
    )
    batches = take(loader, 10)
    assert loader.stream_names == ["red", "blue"]
    for epoch in (batches[:5], batches[5:]):
        assert sum(loader.shares(batch)[0] for batch in epoch) / 5 == 0.25
        assert sum(loader.shares(batch)[1] for batch in epoch) / 5 == 0.75
    read = Counter(name for batch in batches for name in batch.ids)
    assert len(read) == 80 and set(read.values()) == {1}, "two halves are the whole"


def captions_of(folder: Path, count: int, texts: int) -> Path:
    def record(image: int) -> Record:
        return Record(f"{image}", jpeg(image), [f"text {image} {t}" for t in range(texts)], "s")

    write_shards(folder, map(record, range(count)), shard_size="20kb")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_five_repeats_read_each_of_five_captions(
    tmp_path: Path, make_loader: MakeLoader, workers: int
) -> None:
    streams = [stream(captions_of(tmp_path / "set", 16, texts=5), repeat=5.0)]
    batches = take(make_loader(streams, workers=workers), 20)
    for epoch in (batches[:10], batches[10:]):
        read = Counter(text for batch in epoch for text in batch.captions)
        assert read == {f"text {i} {t}": 1 for i in range(16) for t in range(5)}
    again = take(make_loader(streams), 20)
    assert [batch.captions for batch in again] == [batch.captions for batch in batches]


def test_each_caption_once_an_epoch(tmp_path: Path, make_loader: MakeLoader) -> None:
    """Images have one to five captions, as in Visual Genome.

    Two ranks, and a run that resumes in the middle of an epoch, read in the order of one rank.
    """
    records = []
    for i in range(32):
        captions = [f"{i} {t}" for t in range(1 + i % 5)]
        records.append(Record(f"{i}", jpeg(i), captions, "s"))
    write_shards(tmp_path / "set", records, shard_size="20kb")
    texts = {text for record in records for text in record.captions}
    assert len(texts) == 93
    streams = [stream(tmp_path / "set", repeat="captions")]
    batches = take(make_loader(streams, global_batch=31), 6)
    for epoch in (batches[:3], batches[3:]):
        read: list[tuple[str, str]] = []
        for batch in epoch:
            read += zip(batch.captions, batch.ids, strict=True)
        assert {text for text, _ in read} == texts and len(read) == 93
        assert all(text.split()[0] == name for text, name in read)
    assert batches[0].captions != batches[3].captions
    whole = [text for batch in batches for text in batch.captions]

    loader = make_loader(streams, global_batch=31, workers=2)
    begun = take(loader, 2)
    resumed = make_loader(streams, global_batch=31)
    resumed.load_state_dict(loader.state_dict())
    assert [text for batch in (*begun, *take(resumed, 4)) for text in batch.captions] == whole
    ranks = [take(make_loader(streams, rank, 2, global_batch=62), 3) for rank in range(2)]
    parts = [text for step in zip(*ranks, strict=True) for batch in step for text in batch.captions]
    assert set(parts[:62]) < texts and len(set(parts[:62])) == 62


def test_one_caption_each_is_the_order_of_once(tmp_path: Path, make_loader: MakeLoader) -> None:
    folder = captions_of(tmp_path / "set", 32, texts=1)

    def ids(recipe: StreamRecipe) -> list[list[str]]:
        return [batch.ids for batch in take(make_loader([recipe]), 8)]

    assert ids(stream(folder, repeat="captions")) == ids(stream(folder))


def test_an_index_without_captions_is_refused(tmp_path: Path, make_loader: MakeLoader) -> None:
    folder = captions_of(tmp_path / "set", 16, texts=2)
    index = folder / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"captions": []}))
    with pytest.raises(ValueError, match=r"stream 'set': .*lacks the number of captions"):
        make_loader([stream(folder, repeat="captions")])
    make_loader([stream(folder)])


def test_captions_take_turns_over_epochs_and_begin_anywhere(
    tmp_path: Path, make_loader: MakeLoader
) -> None:
    streams = [stream(captions_of(tmp_path / "set", 24, texts=3))]
    batches = take(make_loader(streams), 9)

    def texts(batches: Iterable[Batch]) -> set[str]:
        return {text for batch in batches for text in batch.captions}

    epochs = [texts(batches[begin : begin + 3]) for begin in (0, 3, 6)]
    assert len(set.union(*epochs)) == 72, "three epochs read all three captions of 24 images"
    assert len({text.split()[-1] for text in epochs[0]}) == 3, "not all begin with the same one"
    assert texts(take(make_loader(streams, seed=2), 3)) != epochs[0]
