"""A tiny checkpoint of ours with random weights, its Hugging Face folders, drawings as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_blip
import tiny_runs

from blip_scale.commands import convert_checkpoint


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder in our format with its tokenizer."""
    vocabulary = tiny_blip.vocabulary(tmp_path_factory.mktemp("words") / "vocabulary")
    folder = tmp_path_factory.mktemp("ours") / "step_00000007"
    return tiny_blip.write_ours(folder, tiny_blip.config(vocabulary), vocabulary)


@pytest.fixture(scope="session")
def hf(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network as folders captioning, retrieval and vqa."""
    folder = tmp_path_factory.mktemp("hf") / "hf"
    assert convert_checkpoint.main([str(ours), str(folder), "--head", "all"]) == 0
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 drawings as PNG files, one of them deeper."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deeper").mkdir()
    for record in tiny_runs.records("p")[::4]:
        place = folder / "deeper" if "white" in record.id else folder
        (place / f"{record.id}.png").write_bytes(record.image)
    return folder
