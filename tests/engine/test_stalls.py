"""Test hang limits by phase, the ranks that are named, and the end of hanging processes."""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch.distributed as dist
import train_with_a_long_evaluation

from blip_scale import launcher
from blip_scale.config import step_limit
from blip_scale.config.recipe import HangLimitsRecipe, load
from blip_scale.engine.watching import stalls
from blip_scale.engine.watching.hang_limits import HangLimits
from blip_scale.engine.watching.peers import RankState, RollCall, suspects
from blip_scale.engine.watching.stalls import StallTimer
from blip_scale.evaluation.captions_and_pairs import my_batches


def test_a_step_may_take_twenty_medians() -> None:
    limits = HangLimits(HangLimitsRecipe())
    assert (limits.of_phase("starting"), limits.of_phase("training")) == (900, 900)
    for seconds in (300.0, 12.0, 12.0):  # the first steps compile
        assert limits.of_phase("training") == 900
        assert limits.setting_of("training") == "start_s"
        limits.note_step(seconds)
    assert limits.of_phase("training") == 240 and limits.setting_of("training") == "step_s"
    for _ in range(100):
        limits.note_step(0.5)
    assert limits.of_phase("training") == 180
    for _ in range(100):
        limits.note_step(1000)
    assert limits.of_phase("training") == limits.of_phase("evaluating") == 1800
    assert (limits.of_phase("saving"), limits.longest_s, limits.shortest_s) == (900, 1800, 180)


def test_a_batch_of_an_evaluation_may_take_twenty_medians() -> None:
    limits = HangLimits(HangLimitsRecipe(), data_retry_s=100)
    for _ in range(3):
        assert limits.of_phase("evaluating") == 1900
        limits.note_batch(12.0)
    assert limits.of_phase("evaluating") == 240 + 100
    limits.end_batches()
    assert limits.of_phase("evaluating") == 1900, "this rank waits for the others"
    unlimited = HangLimits(HangLimitsRecipe(evaluation_s=0))
    for _ in range(3):
        unlimited.note_batch(12.0)
    assert unlimited.of_phase("evaluating") == math.inf


def test_limits_leave_time_for_retries_of_a_bucket() -> None:
    remote = ["data.streams=[{name: a, local: /a, remote: s3://b/a}]", "data.retry_s=100"]
    limits = HangLimits.of(load("demo", [*remote, "checkpoint.folder=s3://b/c"]))
    assert limits.of_phase("starting") == 900 + 100 + 300
    assert limits.of_phase("evaluating") == 1900
    assert limits.of_phase("saving") == 1200
    none = HangLimits.of(load("demo", ["hang_limits.step_s=7", "hang_limits.evaluation_s=0"]))
    assert (none.shortest_s, none.longest_s) == (7, math.inf)
    longer = HangLimits.of(load("demo", [*remote, "hang_limits.step_s=7000"]))
    assert longer.longest_s == 7100, "exchanges wait as long as a rank may wait for its data"


def state(rank: int, pulse: int, exchanges: int = 5, **more: Any) -> RankState:
    return RankState(rank, f"n{rank}", "training", 7, exchanges, more.get("waits", 0.0), pulse)


def readings(*states: RankState) -> dict[int, RankState]:
    return {shown.rank: shown for shown in states}


def test_who_stands_still_or_is_behind_is_named() -> None:
    before = readings(state(0, 4), state(1, 4), state(2, 4, 3))
    stopped = suspects(before, readings(state(0, 9), state(1, 4), state(2, 9, 3)))
    assert [(suspect.rank, suspect.node) for suspect in stopped] == [(1, "n1")]
    assert "gives no sign of life; last seen (training, 7 steps done)" in str(stopped[0])
    (behind,) = suspects(before, readings(state(0, 9), state(1, 9), state(2, 9, 3, waits=8.4)))
    where = "training, 7 steps done, waiting for data for 8 s"
    assert str(behind) == f"rank 2 on n2, which is behind the others ({where})"
    assert suspects(before, readings(state(0, 9), state(1, 9), state(2, 9))) == []


def lost_after(*pulses: int, phase: str = "evaluating") -> list[int]:
    """Return the ranks that count as lost after rank 1 has sent these pulses, one per tick."""
    calls = RollCall(most_ticks=2)
    for round, pulse in enumerate(pulses):
        silent = RankState(1, "n1", phase, 0, 5, 0.0, pulse)
        calls.note(readings(state(0, round), silent))
    return [suspect.rank for suspect in calls.lost()]


def test_a_rank_is_lost_after_enough_ticks_without_a_sign_of_life() -> None:
    assert lost_after(4, 4, 4) == [1]
    assert lost_after(4, 4) == lost_after(4, 4, 5, 5) == []
    assert lost_after(4, 4, 4, phase="starting") == [], "imports hold the interpreter's lock"


def limits_of(seconds: float, data_retry_s: float = 0.0) -> HangLimits:
    """Return limits: the given one for start and steps, and long ones for other phases."""
    return HangLimits(HangLimitsRecipe(seconds, seconds, 60, 60), data_retry_s)


def hang_in_python() -> None:
    threading.Event().wait()


def hang_in_c_with_the_interpreter_locked() -> None:
    ctypes.PyDLL(None).sleep(60)


def stall(run: Path, timeout_s: float, hang: Callable[[], None]) -> None:
    """Act as a rank that makes progress for a while, and then hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest handles SIGALRM, a rank does not
    (run / "logs").mkdir(exist_ok=True)
    timer = StallTimer(run, 3, limits_of(timeout_s))
    for step in range(8):
        time.sleep(timeout_s / 4)
        timer.beat("training", step)
    (run / "hangs").touch()
    hang()


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def wait_for_data(
    run: Path, rank: int, port: int, data_retry_s: float, limit_s: float = 1.0
) -> None:
    """Act as one of two ranks. Rank 0 hosts the store, and rank 1 waits for its data forever."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
    store = None
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
        (run / "store").touch()
    wait_until((run / "store").exists)
    (run / "logs").mkdir(exist_ok=True)
    timer = StallTimer(run, rank, limits_of(limit_s, data_retry_s))
    timer.join(2, lambda: 2 - rank)
    peers = timer._peers
    assert peers is not None
    wait_until(lambda: peers._knows_main_node)  # rank 0 has published its state
    (run / f"joined_{rank}").touch()
    for step in range(5):
        timer.beat("training", step)
    if rank == 0:
        hang_in_python()
    with timer.waiting_for_data():
        hang_in_python()
    assert store is None


def wait_in_an_evaluation(run: Path, rank: int, port: int) -> None:
    """Act as one of two ranks with an evaluation that does not end. Its limit is a minute."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    (run / "logs").mkdir(exist_ok=True)
    timer = StallTimer(run, rank, limits_of(60.0))
    timer.join(2, int)
    timer.beat("evaluating", 4)
    time.sleep(0.5)  # enough to publish the state several times
    (run / f"joined_{rank}").touch()
    hang_in_python()
    del store


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Run a function in a separate process."""
    started = []

    def start(*arguments: Any, target: Callable[..., None] = stall) -> Any:
        process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("hang", [hang_in_python, hang_in_c_with_the_interpreter_locked])
def test_a_process_that_stalls_ends_with_its_stacks_in_the_log(
    tmp_path: Path,
    start: Callable[..., Any],
    hang: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    process = start(tmp_path, 1.0, hang)
    process.join(30)
    assert process.exitcode == 1
    assert (tmp_path / "hangs").exists()  # beats reset the timer, so it did not fire before
    log = (tmp_path / "logs" / "rank_3.log").read_text()
    assert "Timeout (0:00:03" in log
    assert f"in {hang.__name__}" in log and "in stall" in log
    if hang is hang_in_python:  # otherwise no Python thread can report
        words = "rank 3 on n7 stalled: no progress for 1 s while training, 7 steps done"
        assert words in capfd.readouterr().err and words in log
        (entry,) = map(json.loads, (tmp_path / "stalls.jsonl").read_text().splitlines())
        assert (entry["rank"], entry["node"], entry["phase"]) == (3, "n7", "training")


def test_a_rank_may_wait_for_data_while_its_remote_is_retried(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    """Another rank, in a collective, waits as long, and finally names the rank without data."""
    began = time.monotonic()
    port = launcher.free_port()
    ranks = [start(tmp_path, rank, port, 3.0, target=wait_for_data) for rank in range(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [1, 1]
    assert time.monotonic() - began > 3
    entries = [json.loads(line) for line in (tmp_path / "stalls.jsonl").read_text().splitlines()]
    suspected = {entry["rank"]: [s["rank"] for s in entry["suspects"]] for entry in entries}
    assert suspected[0] == [1]
    assert "waiting for data" in (tmp_path / "logs" / "rank_0.log").read_text()


def test_a_long_wait_for_data_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stalls, "_LONGEST_TICK_S", 0.02)
    monkeypatch.setattr(stalls, "_LONG_WAIT_S", 0.1)
    (tmp_path / "logs").mkdir()
    timer = StallTimer(tmp_path, 3, limits_of(60.0))
    timer.beat("training", 7)
    for seconds in (0.5, 0.0):
        with timer.waiting_for_data():
            time.sleep(seconds)
    timer.close()
    (warning,) = [text for text in caplog.messages if "for data" in text]
    assert warning.startswith("step 7: rank 3 on ")


def test_a_stopped_rank_0_is_named_though_the_store_stops_with_it(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    """The limit exceeds the store's timeout of 2 s, so that a message can be written."""
    port = launcher.free_port()
    ranks = [start(tmp_path, rank, port, 0.0, 3.0, target=wait_for_data) for rank in range(2)]
    while len(list(tmp_path.glob("joined_*"))) < 2:
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.01)
    os.kill(ranks[0].pid, signal.SIGSTOP)
    ranks[1].join(30)
    assert ranks[1].exitcode == 1
    words = r"it waits for rank 0 on n1, which gives no sign of life"
    assert re.search(words, (tmp_path / "logs" / "rank_1.log").read_text())


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_lost_before_the_limit_of_a_long_phase(
    tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    monkeypatch.setattr(stalls, "_LONGEST_TICK_S", 0.1)
    monkeypatch.setattr(stalls, "_SILENT_S", 1.0)
    port = launcher.free_port()
    ranks = []
    for rank in range(2):  # rank 0 first, because it hosts the store
        ranks.append(start(tmp_path, rank, port, target=wait_in_an_evaluation))
        while not (tmp_path / f"joined_{rank}").exists():
            assert ranks[rank].is_alive()
            time.sleep(0.01)
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    waits = 1 - stopped
    ranks[waits].join(50)
    assert ranks[waits].exitcode == 1
    log = (tmp_path / "logs" / f"rank_{waits}.log").read_text()
    trouble = "a rank has given no sign of life for 1 s while evaluating, 4 steps done"
    assert f"rank {waits} on n{waits + 1} stalled: {trouble}" in log
    assert f"it waits for rank {stopped} on n{stopped + 1}, which gives no sign of life" in log
    assert "in hang_in_python" in log


def hang_in_a_batch(run: Path) -> None:
    """Act as a rank whose evaluation hangs in its eighth batch, under long limits."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    (run / "logs").mkdir()
    timer = StallTimer(run, 0, limits_of(60.0))
    timer.beat("evaluating", 4)
    for batch in my_batches(20, 2):
        if batch.start == 14:
            hang_in_python()


def test_a_hang_in_a_batch_ends_before_the_limit_of_the_evaluation(
    tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_limit, "SHORTEST_S", 1.0)
    monkeypatch.setattr(stalls, "_LONGEST_TICK_S", 0.1)
    process = start(tmp_path, target=hang_in_a_batch)
    process.join(40)
    assert process.exitcode == 1
    assert "no progress for 1 s while evaluating" in (tmp_path / "logs/rank_0.log").read_text()


@pytest.mark.multiprocess
def test_an_evaluation_that_hangs_ends_the_run(tmp_path: Path) -> None:
    """An evaluation has its own limit. The logged stacks show where it hangs."""
    (tmp_path / train_with_a_long_evaluation.SLOW).touch()
    recipe = tiny_runs.make_recipe(
        tmp_path, evaluation={"every_steps": 2}, hang_limits={"evaluation_s": 3}
    )
    script = Path(train_with_a_long_evaluation.__file__)
    (rank,) = tiny_runs.launch(recipe, 1, script=script)
    assert rank.wait(120) == 1
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "no progress for 3 s while evaluating, 2 steps done (hang_limits.evaluation_s)" in log
    assert "Timeout (0:00:05" in log and "train_with_a_long_evaluation.py" in log
    assert "rank 0 on" in tiny_runs.said(recipe) and "stalled" in tiny_runs.said(recipe)


def test_a_log_on_a_dead_disk_does_not_keep_it_alive(
    tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing stacks to a full pipe blocks, like writing to a mount whose server is down."""
    monkeypatch.setattr(stalls, "_GRACE_S", 1.0)
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "rank_3.log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(log, os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.close(writer)
    process = start(tmp_path, 1.0, hang_in_python)
    process.join(30)
    assert process.exitcode == -signal.SIGALRM
    os.close(reader)


def test_the_timer_can_be_stopped_and_be_off(tmp_path: Path, start: Callable[..., Any]) -> None:
    (tmp_path / "logs").mkdir()
    StallTimer(tmp_path, 0, limits_of(0.5)).close()
    process = start(tmp_path, 0, lambda: time.sleep(3))
    process.join(30)
    assert process.exitcode == 0  # this process was not ended either, 3 s later
