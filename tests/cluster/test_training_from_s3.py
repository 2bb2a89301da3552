"""ZeRO-3 runs with data or checkpoints in a bucket equal a run from folders bit for bit."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import psutil
import pytest
import tiny_runs
import train_on_nodes
import train_with_a_long_evaluation as long_evaluation
from faulty_proxy import faulty_proxy
from s3_server import S3Server

pytestmark = [pytest.mark.multiprocess, pytest.mark.s3]

STEPS = 48  # enough that every kill comes before the end
RANKS = 2


def make_recipe(folder: Path, **data: object) -> Path:
    return tiny_runs.make_recipe(
        folder,
        checkpoint={"every_steps": 6, "keep_last": 2},
        train={"max_steps": STEPS},
        data=data,
    )


def from_bucket(folder: Path, s3: S3Server) -> Path:
    """Write a recipe whose loader workers never stop fetching: half of the shards fit the cache."""
    make_recipe(folder)
    shapes = folder / "shapes"
    size = max(path.stat().st_size for path in shapes.glob("shard.*"))
    remote = {"name": "shapes", "local": str(folder / "cache"), "remote": s3.upload(shapes)}
    limit = str(2 * size)
    return make_recipe(folder, streams=[remote], cache_limit=limit, retry_s=120, workers=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Losses of a run from the folder without loader workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny_runs.train(make_recipe(folder), RANKS)
    return tiny_runs.losses(folder / "run")


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    file, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (file.exists() and f'"step": {step},' in file.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, "the step never came"
        time.sleep(0.005)


def wait_for_evaluation(run: Path, process: subprocess.Popen) -> None:
    """Wait until an evaluation is under way."""
    file, deadline = run / "heartbeat.json", time.monotonic() + 240
    while not (file.exists() and '"phase": "evaluating"' in file.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, "no evaluation came"
        time.sleep(0.02)


def upload_s(run: Path) -> float:
    """Seconds that the uploads of the newest start took."""
    logged = (run / "logs" / "rank_0.log").read_text().rpartition("resuming at step")[2]
    return sum(map(float, re.findall(r"uploaded step_\d+ to \S+ in ([\d.]+) s", logged)))


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
    """All requests go through a proxy that fails one in twenty."""
    recipe = from_bucket(tmp_path, s3)
    with faulty_proxy(s3.port, monkeypatch, share=0.05, seed=int(time.time())) as proxy:
        processes = tiny_runs.launch(recipe, RANKS)
        wait_for_step(tmp_path, 4, processes[0])
        s3.stop()
        time.sleep(1)
        s3.start()
        wait_for_step(tmp_path, 10, processes[0])
        rank = psutil.Process(processes[1].pid)
        workers = [p for p in rank.children(recursive=True) if p.ppid() != rank.pid]
        assert len(workers) == 1
        workers[0].kill()
        assert tiny_runs.finish(processes) == [0] * RANKS, tiny_runs.said(recipe)
        assert sum(proxy.faults.values())
    assert_nothing_lost(recipe, undisturbed)
    logged = "".join(file.read_text() for file in (tmp_path / "run" / "logs").iterdir())
    assert "failed, retrying in" in logged
    assert f"a loader worker died (pid {workers[0].pid}: exit code -9)" in logged
    assert "an epoch of 64 pairs: shapes 100.0% (64 = 1 x 64)" in logged


def test_killed_ranks_go_on_from_the_bucket(
    s3: S3Server, tmp_path: Path, undisturbed: dict[int, dict[str, float]]
) -> None:
    """A rank dies and ends the other one, leaving half-written files in the cache."""
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


def test_checkpoints_in_a_bucket(
    s3: S3Server,
    tmp_path: Path,
    undisturbed: dict[int, dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two nodes without a common disk survive an outage, killed ranks and a replaced node."""
    recipe = make_recipe(tmp_path)
    run, node = tmp_path / "node_0", tmp_path / "node_1"
    script = Path(train_on_nodes.__file__)
    arguments = [
        f"--nodes={tmp_path}", f"checkpoint.folder=s3://{s3.bucket}/{uuid.uuid4().hex[:8]}",
        "checkpoint.retry_s=1", "checkpoint.every_steps=2",
    ]  # fmt: skip

    def is_logged(what: str) -> bool:
        log = run / "logs" / "rank_0.log"
        return log.exists() and re.search(what, log.read_text()) is not None

    def wait_for(what: str, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 240
        while not is_logged(what):
            assert time.monotonic() < deadline and process.poll() is None, tiny_runs.said(recipe)
            time.sleep(0.005)

    with faulty_proxy(s3.port, monkeypatch, share=0) as proxy:
        processes = tiny_runs.launch(recipe, RANKS, *arguments, script=script)
        wait_for("uploaded step_00000002", processes[0])
        proxy.share = 1
        wait_for(r"step_\d+ was not uploaded", processes[0])
        proxy.share = 0
        wait_for(r"(?s)was not uploaded.* uploaded step_", processes[0])
        for process in processes:
            process.kill()
        assert tiny_runs.finish(processes) == [-signal.SIGKILL] * RANKS
        shutil.rmtree(node)
        codes = tiny_runs.finish(tiny_runs.launch(recipe, RANKS, *arguments, script=script))
        assert codes == [0] * RANKS, tiny_runs.said(recipe)
    assert tiny_runs.losses(run) == undisturbed, tiny_runs.said(recipe)[-3000:]
    assert is_logged(r"resuming at step \d*[02468] from")
    assert "is missing here: fetching it from s3://" in (node / "logs/rank_1.log").read_text()
    for place in (run, node):
        names = [path.name for path in sorted((place / "checkpoints").iterdir())]
        assert names == [f"step_{STEPS - 2:08}", f"step_{STEPS:08}"]


def test_a_run_whose_last_upload_fails_does_not_end_well(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again uploads what is missing, and then the run is done.

    Before that, a signal stops an evaluation at once, and its checkpoint is uploaded all the same.
    """
    evaluated = STEPS // 2
    recipe = make_recipe(tmp_path, workers=0)
    bucket = f"s3://{s3.bucket}/{uuid.uuid4().hex[:8]}"
    settings = [f"checkpoint.folder={bucket}", f"evaluation.every_steps={evaluated}"]
    script, slow = Path(long_evaluation.__file__), tmp_path / long_evaluation.SLOW
    with faulty_proxy(s3.port, monkeypatch, share=0) as proxy:
        slow.touch()
        processes = tiny_runs.launch(recipe, RANKS, *settings, script=script)
        wait_for_evaluation(tmp_path / "run", processes[0])
        began = time.monotonic()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert tiny_runs.finish(processes) == [75] * RANKS, tiny_runs.said(recipe)
        assert time.monotonic() - began < long_evaluation.SECONDS / 2
        assert f"step_{evaluated:08}: uploaded" in tiny_runs.said(recipe)
        assert "manifest.json" in s3.names(f"{bucket}/step_{evaluated:08}/")
        slow.unlink()

        settings.append("checkpoint.retry_s=1")
        processes = tiny_runs.launch(recipe, RANKS, *settings)
        wait_for_step(tmp_path, evaluated + 1, processes[0])
        proxy.share = 1
        assert tiny_runs.finish(processes) == [1] * RANKS, tiny_runs.said(recipe)
        assert f"step_{STEPS:08} not uploaded to {bucket}" in tiny_runs.said(recipe)
        proxy.share, proxy.pause_s = 0, 0.6
        retry_s = 5  # the uploads take longer, but each request less
        settings[-1] = f"checkpoint.retry_s={retry_s}"
        again = tiny_runs.finish(tiny_runs.launch(recipe, RANKS, *settings))
        assert again == [0] * RANKS, tiny_runs.said(recipe)
        assert upload_s(tmp_path / "run") > retry_s
    assert "manifest.json" in s3.names(f"{bucket}/step_{STEPS:08}/")
