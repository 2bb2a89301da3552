"""A tiny training checkpoint, and the command that converts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_blip
from tiny_blip import Convert

from blip_scale.commands import convert_checkpoint


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer folder of the tiny words."""
    return tiny_blip.vocabulary(tmp_path_factory.mktemp("words") / "vocabulary")


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    """A training checkpoint with momentum copies, queues and a tokenizer."""
    folder = tmp_path_factory.mktemp("ours") / "step_00000007"
    return tiny_blip.write_ours(folder, tiny_blip.config(vocabulary), vocabulary)


@pytest.fixture(scope="session")
def convert() -> Convert:
    """Run the command, which must succeed, and return its output path."""

    def run(source: Path, out: Path, *arguments: str) -> Path:
        assert convert_checkpoint.main([str(source), str(out), *arguments]) == 0
        return out

    return run
