"""tools/benchmarks/gpu_report.py: every part on the CPU, and the files after a failure or kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tools.benchmarks import gpu_parts, gpu_report, gpu_rows, gpu_tables
from tools.benchmarks.device_work import summary

REPO = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(REPO / "tools" / "benchmarks" / "gpu_report.py")]


def call(name: str, start: float, duration: float, kind: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration}


def test_a_trace_is_counted() -> None:
    events = [
        call("cudaLaunchKernel", 0, 5),
        call("cudaLaunchKernelExC", 10, 600),  # waited 500 us for room in the queue
        call("cuLaunchKernel", 620, 5, "cuda_driver"),
        call("cudaGraphLaunch", 630, 40),
        call("cudaMemcpyAsync", 680, 5),
        call("cudaStreamSynchronize", 700, 1000),
        call("cudaMalloc", 1800, 50),
        call("cudaEventSynchronize", 1900, 200),
        call("cudaDeviceSynchronize", 9000, 4000),  # the profiler's
        call("gemm", 100, 300, "kernel"),
        call("norm", 350, 100, "kernel"),  # on another stream, 50 us beside the first
        call("Memcpy HtoD", 500, 100, "gpu_memcpy"),
        call("aten::mm", 0, 9000, "cpu_op"),
    ]
    figures = summary(events, seconds=0.005, profilers_waits=1)
    assert figures["kernel_s"] == pytest.approx(400e-6)
    assert figures["busy_s"] == pytest.approx(450e-6)
    assert figures["host_s"] == pytest.approx(0.005 - 1200e-6 - 500e-6)
    assert figures["waits"] == {"cudaStreamSynchronize": 1, "cudaEventSynchronize": 1}
    counts = ("launches", "graph_launches", "kernels", "copies", "allocations")
    assert [figures[name] for name in counts] == [3, 1, 2, 1, {"cudaMalloc": 1}]


def test_tables_hold_what_was_measured() -> None:
    step = {"part": "step bf16 64", "contender": "ours", "precision": "bf16", "batch_size": 64}
    rows: list[dict[str, Any]] = [
        {"part": "environment", "what": "peak", "kind": "bf16", "tflops": 800.0},
        {**step, "seconds": 0.1, "pairs_per_s": 640.0},
        {**step, "flops": 16e12, "launches": 900, "graph_launches": 1, "kernels": 4000,
         "copies": 3, "waits": {"cudaEventSynchronize": 1}, "host_s": 0.01},
        {**step, "contender": "compiled", "refused": "refused: not on a | CPU"},
        {**step, "waiting_places": {"blip_scale/engine/loop.py:7 step": 1}},
    ]  # fmt: skip
    states = [{"part": "step bf16 64", "state": "done", "seconds": 3.0, "reason": None}]
    text = gpu_tables.markdown(states, rows)
    assert "| ours | 0.1000 | 640 |  |  | 0.0100 | 20.0% |" in text
    assert "| ours | 1 | cudaEventSynchronize 1 | 900 | 1 | 4000 | 3 |" in text
    assert "refused: not on a \\| CPU |" in text
    assert "| blip_scale/engine/loop.py:7 step | 1 |" in text
    assert "Attention" not in text and "demo" not in text


def test_rows_survive_a_cut_line(tmp_path: Path) -> None:
    gpu_rows.Rows(tmp_path, "attention").add(ms=1.5)
    with (tmp_path / gpu_rows.NAME).open("a") as file:
        file.write('{"part": "atten')
    (row,) = gpu_rows.read(tmp_path)
    assert (row["part"], row["ms"]) == ("attention", 1.5)


def test_a_part_without_its_packages_is_left_out(tmp_path: Path) -> None:
    part = gpu_parts.Part("demo", 60, 5, gpu_parts.demo, ("torch", "no_such_package"))
    settings = gpu_parts.Settings(tmp_path, "cpu", True, tmp_path)
    (state,) = gpu_report._run_all([part], settings, 600, [])
    assert state["state"] == "left out"
    assert state["reason"] == "not installed: no_such_package; see --wheels"
    assert "no_such_package" in (tmp_path / gpu_report.TABLES).read_text()


def test_a_part_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    part = gpu_parts.Part("demo", 60, 30, gpu_parts.demo)
    settings = gpu_parts.Settings(tmp_path, "cpu", True, tmp_path)
    (state,) = gpu_report._run_all([part], settings, 6, [])
    assert state["state"] == "left out" and state["reason"].startswith("out of time")


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main([str(tmp_path), "--parts", "attentoin"]) == 2
    assert "expected some of ['environment', 'step bf16 64'" in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_other_parts_go_on_after_a_failure(tmp_path: Path) -> None:
    parts = ["--parts", "environment", "tests"]
    done = subprocess.run([*COMMAND, tmp_path, *parts], capture_output=True, text=True)
    assert done.returncode == 1
    report = json.loads((tmp_path / gpu_report.REPORT).read_text())
    environment, tests = report["parts"]
    assert environment["state"] == "failed" and "NVIDIA" in environment["reason"]
    assert report["rows"][0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert tests["state"] == "done"
    counts = report["rows"][-1]
    assert counts["what"] == "tests" and counts["skipped"] > 0 == counts["failed"]


@pytest.mark.multiprocess
def test_a_kill_loses_no_row_and_leaves_no_process(tmp_path: Path) -> None:
    """At its full size `attention` takes minutes on a CPU; it is ended after its first row."""
    arguments = [str(tmp_path), "--device", "cpu", "--parts", "attention"]
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not gpu_rows.read(tmp_path):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.2)
        parts = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 1
    assert parts
    assert not psutil.wait_procs(parts, timeout=120)[1]
    assert gpu_rows.read(tmp_path)[0]["kernel"] == "torch_flash"


@pytest.mark.multiprocess
@pytest.mark.timeout(600)
def test_every_part_on_the_cpu(tmp_path: Path) -> None:
    """Parts run at a tiny size.

    Parts of the step differ only in their sizes, so one stands for all.
    """
    parts = ["environment", "step bf16 64", "attention", "demo"]
    arguments = ["--device", "cpu", "--tiny", "--minutes", "9", "--parts", *parts]
    done = subprocess.run([*COMMAND, tmp_path, *arguments], capture_output=True, text=True)
    log = (tmp_path / gpu_report.LOG).read_text()
    assert done.returncode == 0, done.stderr + log[-3000:]
    rows = gpu_rows.read(tmp_path)
    assert {row["kind"] for row in rows if row.get("what") == "peak"} == {"bf16", "fp32"}
    step = gpu_tables.merged((row for row in rows if row["part"] == "step bf16 64"), ("contender",))
    contenders = {row["contender"]: row for row in step}
    for name in ("published", "plain PyTorch", "ZeRO-3"):
        row = contenders[name]
        assert row["seconds"] > 0 and row["flops"] > 1e6 and row["first_steps_s"] > 0, row
        assert "no CUDA device" in row["profile_skipped"]
    assert contenders["published"]["flops"] > 1.2 * contenders["ZeRO-3"]["flops"]
    for name in ("ZeRO-3, CUDA graph", "ZeRO-3, compiled CUDA graph"):
        assert contenders[name]["refused"].startswith("refused: "), contenders[name]
    kernels = [row for row in rows if row["part"] == "attention" and row["kernel"] == "SDPA, math"]
    assert len(kernels) == 7 and all(row["ms"] > 0 for row in kernels)
    assert all(row["max_error"] < 0.05 for row in kernels if not row["dropout"])
    (demo,) = (row for row in rows if row["part"] == "demo")
    assert demo["steps"] == 2 and demo["losses_last"]["loss/lm"] > 0
    tables = (tmp_path / gpu_report.TABLES).read_text()
    for title in ("### The step: bf16, micro-batch 4", "### Attention", "### The demo to its end"):
        assert title in tables
