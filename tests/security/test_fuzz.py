"""Damaged and hostile inputs of every kind are read or refused, without tracebacks and hangs.

Set FUZZ_SECONDS=300 for a search of minutes instead of seconds.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzzing import TARGETS, attempt, fuzz

SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_whole_is_read(name: str, tmp_path: Path) -> None:
    """The unmutated inputs are read; otherwise the mutations would test nothing."""
    target = TARGETS[name]
    if name == "manifest":  # its files are missing
        with pytest.raises(FileNotFoundError, match="rank_00000"):
            (tmp_path / target.name).write_bytes(target.content)
            target.read(tmp_path / target.name)
        return
    refuses_nothing = target.__class__(target.name, target.content, target.read, ())
    assert attempt(refuses_nothing, target.content, tmp_path / name) is None


@pytest.mark.timeout(SECONDS + 200)
def test_no_input_breaks_a_reader() -> None:
    done, broken = fuzz(SECONDS, seed=int(os.environ.get("FUZZ_SEED", "18")), names=list(TARGETS))
    assert set(done) == set(TARGETS)
    assert not broken, "\n".join(f"{title}\n{failure}" for title, failure in broken.items())
