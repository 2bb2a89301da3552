"""Fixtures: small sets of shards, a small vocabulary, and loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import VOCABULARY, MakeLoader, MakeShards, hurry, jpeg

from blip_scale.config.model_recipe import TextRecipe
from blip_scale.config.recipe import DataRecipe, StreamRecipe
from blip_scale.data.loading.loader import TrainLoader
from blip_scale.data.loading.micro_batches import CaptionInput, LoaderPosition
from blip_scale.data.shards import Record, write_shards
from blip_scale.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT tokenizer whose special tokens have other ids than bert-base-uncased's."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(vocabulary: Path) -> CaptionInput:
    return CaptionInput(
        load_tokenizer(TextRecipe(checkpoint=None, tokenizer=str(vocabulary))), max_tokens=8
    )


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Function that writes a set with the ids name-0, name-1, ...; about 8 samples per shard."""

    def make(
        name: str, count: int, corrupt: frozenset[int] = frozenset(), compression: str | None = None
    ) -> Path:
        def record(number: int) -> Record:
            image = b"no image" if number in corrupt else jpeg(number)
            return Record(f"{name}-{number}", image, f"A pair, {name}!", name)

        folder = tmp_path / "sets" / name
        records = map(record, range(count))
        write_shards(folder, records, shard_size="20kb", compression=compression)
        return folder

    return make


@pytest.fixture
def make_loader(text: CaptionInput) -> MakeLoader:
    """Function that opens a loader, whose micro-batch is the whole share of a rank."""

    def make(
        streams: list[StreamRecipe],
        rank: int = 0,
        world_size: int = 1,
        global_batch: int = 8,
        **settings: object,
    ) -> TrainLoader:
        micro_batch = int(settings.pop("micro_batch", global_batch // world_size))  # type: ignore[call-overload]
        seed = int(settings.pop("seed", 1))  # type: ignore[call-overload]
        data = DataRecipe(streams=streams, make_with="make the data", **({"workers": 0} | settings))  # type: ignore[arg-type]
        position = LoaderPosition(rank, world_size, micro_batch, global_batch)
        return TrainLoader(data, 16, text, seed, position, hurry)

    return make
