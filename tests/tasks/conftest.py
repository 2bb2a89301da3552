"""A recipe for the tests of this folder, which use the tiny runs of the engine's tests, too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe
from blip_scale.data.shards import write_shards

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engine"))

import tiny_runs


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Recipe of the tiny run, with a second, smaller held-out set."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_shards(folder / "others", tiny_runs.records("others")[1:10:2])
    file = tiny_runs.make_recipe(
        folder,
        data={
            "heldout": [
                {"name": "heldout", "local": str(folder / "heldout")},
                {"name": "others", "local": str(folder / "others")},
            ]
        },
        evaluation={"captions": 3, "batch_size": 4, "rerank_top_k": 4, "max_caption_tokens": 8},
    )
    return recipes.load(str(file))
