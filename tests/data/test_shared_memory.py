"""Batches go through /dev/shm: too little of it is refused, and a lost batch never hangs."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from blip_scale.data.loading import shared_memory, workers
from blip_scale.data.loading.shared_memory import check_shared_memory, needed_bytes
from blip_scale.errors import RefusedInput

DOCKER = 64 * 2**20


def test_what_is_needed() -> None:
    """Each worker needs room for four batches ahead and the current one."""
    assert needed_bytes(0, 90, 224) == 0
    assert needed_bytes(4, 90, 224) == 4 * 5 * 90 * 3 * 224 * 224
    assert needed_bytes(1, 2, 8, images=2) == 2 * needed_bytes(1, 2, 8)


def test_too_little_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        total = DOCKER

    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda folder: Usage)
    needed = needed_bytes(4, 90, 224)
    pattern = rf"64 MiB in {tmp_path}, 517 MiB for 2 rank.*--shm-size=2g .* or lower data.workers"
    with pytest.raises(RefusedInput, match=pattern):
        check_shared_memory(needed, 2, tmp_path)
    assert "64 MiB" in check_shared_memory(DOCKER // 4, 2, tmp_path)
    assert check_shared_memory(0, 8, tmp_path) == "not used"
    assert check_shared_memory(needed, 8, tmp_path / "no such folder") == "not used"


class Unsendable:
    """A batch that the feeder thread cannot send."""

    def __reduce__(self) -> tuple[object, ...]:
        raise RuntimeError("unable to allocate shared memory")


def send(batches: multiprocessing.Queue[object]) -> None:
    """Send a batch like a loader worker."""
    workers.begin({}, None, 0)
    batches.put(Unsendable())
    batches.close()
    batches.join_thread()


def test_a_batch_that_cannot_be_sent_ends_its_worker() -> None:
    """Python's queue would print a traceback and lose the batch; the rank would wait forever."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=send, args=(context.Queue(),))
    process.start()
    process.join(60)
    assert process.exitcode == 1
