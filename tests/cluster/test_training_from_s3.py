"""Whole ZeRO-3 runs whose data lie in a bucket: equal, bit for bit, to a run from the folder."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import tiny_runs
from faulty_proxy import faulty_proxy
from s3_server import S3Server

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]

STEPS = 24
RANKS = 2


def make_recipe(folder: Path, **data: object) -> Path:
    return tiny_runs.make_recipe(
        folder,
        checkpoint={"every_steps": 6, "keep_last": 2},
        train={"max_steps": STEPS},
        data={"workers": 1, **data},
    )


def from_bucket(folder: Path, s3: S3Server) -> Path:
    """A recipe that reads through a cache of two of the four shards: it never stops fetching."""
    make_recipe(folder)
    shapes = folder / "shapes"
    size = max(path.stat().st_size for path in shapes.glob("shard.*"))
    remote = {"name": "shapes", "local": str(folder / "cache"), "remote": s3.upload(shapes)}
    return make_recipe(folder, streams=[remote], cache_limit=str(2 * size), retry_s=120)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Losses of a run from the folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny_runs.train(make_recipe(folder), RANKS)
    return tiny_runs.losses(folder / "run")


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    file, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (file.exists() and f'"step": {step},' in file.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, "the step never came"
        time.sleep(0.005)


def assert_nothing_lost(recipe: Path, undisturbed: dict[int, dict[str, float]]) -> None:
    run = recipe.parent / "run"
    assert tiny_runs.losses(run) == undisturbed, tiny_runs.said(recipe)[-3000:]
    last = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "skipped" in line]
    assert '"data/skipped_samples": 0.0' in last[-1] and '"data/share_shapes": 1.0' in last[-1]


def test_the_server_stops_and_a_loader_worker_is_killed(
    s3: S3Server,
    tmp_path: Path,
    undisturbed: dict[int, dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All through a proxy that fails one request in twenty."""
    recipe = from_bucket(tmp_path, s3)
    with faulty_proxy(s3.port, monkeypatch, share=0.05, seed=int(time.time())) as proxy:
        processes = tiny_runs.launch(recipe, RANKS)
        wait_for_step(tmp_path, 4, processes[0])
        s3.stop()
        time.sleep(1)
        s3.start()
        wait_for_step(tmp_path, 10, processes[0])
        workers = psutil.Process(processes[1].pid).children()
        assert len(workers) == 1
        workers[0].kill()
        assert tiny_runs.finish(processes) == [0] * RANKS, tiny_runs.said(recipe)
        assert sum(proxy.faults.values())
    assert_nothing_lost(recipe, undisturbed)
    said = "".join(file.read_text() for file in (tmp_path / "run" / "logs").iterdir())
    assert "failed, again in" in said
    assert f"a loader worker died (pid {workers[0].pid}: exit code -9)" in said
    assert "an epoch of 64 pairs: shapes 100.0% (64 = 1 x 64)" in said


def test_killed_ranks_go_on_from_the_bucket(
    s3: S3Server, tmp_path: Path, undisturbed: dict[int, dict[str, float]]
) -> None:
    """One rank dies, and the other with it; half-written files lie in the cache."""
    recipe = from_bucket(tmp_path, s3)
    processes = tiny_runs.launch(recipe, RANKS)
    wait_for_step(tmp_path, random.Random(time.time_ns()).randint(7, 16), processes[0])
    processes[1].kill()
    codes = tiny_runs.finish(processes[::-1])
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    for name in ("shard.00000.mds.partial", "shard.00001.mds.partial.1A2b3C4d"):
        (tmp_path / "cache" / name).write_bytes(b"half")
    tiny_runs.train(recipe, RANKS)
    assert_nothing_lost(recipe, undisturbed)
    assert "resuming at step" in tiny_runs.said(recipe)
    assert not list((tmp_path / "cache").glob("shard.00000.mds.*"))
