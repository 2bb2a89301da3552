"""Parts of `gpu_report.py`. Each runs in its own process and adds rows to the report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.benchmarks.gpu_rows import Rows

ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = (
    "torch", "deepspeed", "transformers", "timm", "numpy", "triton", "flash-attn-4", "flash-attn",
    "mosaicml-streaming", "simplejpeg", "obstore", "nvidia-nccl-cu13", "nvidia-cudnn-cu13",
)  # fmt: skip
_STEP_NEEDS = ("torch", "deepspeed", "transformers", "timm", "simplejpeg", "obstore", "pydantic")


@dataclass(frozen=True)
class Settings:
    """Settings of all parts."""

    out: Path
    device: str
    """Device: `cuda` or `cpu`."""
    tiny: bool
    demo_data: Path
    """Folder of the demo's shards, from `prepare_data.py demo`."""


@dataclass(frozen=True)
class Part:
    """One part of the report."""

    name: str
    limit_s: float
    """Time limit of the part."""
    least_s: float
    """Remaining time below which the part is not started."""
    run: Callable[[Settings, Rows], None]
    needs: tuple[str, ...] = ()
    """Import names of required packages; the part is skipped without them."""


def missing(part: Part) -> list[str]:
    """Required packages of the part that are not installed."""
    return [name for name in part.needs if importlib.util.find_spec(name) is None]


def environment(settings: Settings, rows: Rows) -> None:
    """Add versions, the machine, and the measured peak of matrix products."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    rows.add(
        what="environment",
        versions=versions,
        python=platform.python_version(),
        cuda=torch.version.cuda,
        cores=len(os.sched_getaffinity(0)),
        cpu=_cpu_model(),
        commit=_output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    )
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows.add(
            what="environment",
            gpu=properties.name,
            gpu_gib=round(properties.total_memory / 2**30, 1),
            compute_capability=f"{properties.major}.{properties.minor}",
            driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        )
    for kind, tflops in _peaks(torch.device(settings.device), settings.tiny):
        rows.add(what="peak", kind=kind, tflops=tflops)


def _peaks(device: Any, tiny: bool) -> list[tuple[str, float]]:
    """TFLOP/s of the fastest of several large matrix products, by kind."""
    import torch

    from tools.benchmarks.gpu_attention import milliseconds

    size = 8192 if device.type == "cuda" else 128 if tiny else 1024
    peaks = []
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("TF32", torch.float32)):
        if kind == "TF32" and device.type != "cuda":
            continue
        torch.set_float32_matmul_precision("high" if kind == "TF32" else "highest")
        left, right = torch.randn(2, size, size, device=device).to(dtype)

        def product(left: Any = left, right: Any = right) -> None:
            torch.mm(left, right)

        peaks.append((kind, 2 * size**3 / milliseconds(product, device) / 1e9))
    torch.set_float32_matmul_precision("highest")
    return peaks


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor()


def _output(*command: str) -> str | None:
    """First line of a command's output; None if it fails."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip().partition("\n")[0]


def step(precision: str, batch_size: int) -> Callable[[Settings, Rows], None]:
    """Return the part that times the step at one precision and micro-batch."""

    def run(settings: Settings, rows: Rows) -> None:
        from tools.benchmarks.gpu_step import StepPart, run_step

        size = 4 if settings.tiny else batch_size
        rounds, steps = (1, 1) if settings.tiny else (2, 4)
        run_step(StepPart(precision, size, settings.device, settings.tiny, rounds, steps), rows)

    return run


def attention(settings: Settings, rows: Rows) -> None:
    """Measure every attention kernel at the shapes of the step."""
    import torch

    from tools.benchmarks.gpu_attention import run_attention

    run_attention(rows, torch.device(settings.device), settings.tiny)


def gpu_tests(settings: Settings, rows: Rows) -> None:
    """Run the tests marked `gpu`. Add their counts, and a row for each test that did not pass."""
    files = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if "pytest.mark.gpu" in file.read_text(encoding="utf-8"):
            files.append(str(file))
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        command += ["--continue-on-collection-errors", *files]
        subprocess.run(command, cwd=ROOT, check=False)
        suite = ElementTree.parse(report).getroot()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for test in suite.iter("testcase"):
        name = f"{test.get('classname')}.{test.get('name')}"
        outcome, message = "passed", None
        for child in test:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = " ".join((child.get("message") or "").split())[:200]
        counts[outcome] += 1
        if message is not None:
            rows.add(what="test", test=name, outcome=outcome, message=message)
    rows.add(what="tests", **counts)


def demo(settings: Settings, rows: Rows) -> None:
    """Train the demo recipe on one rank. Add the seconds and the figures of its summary.

    With `tiny`, train two steps on images of noise.
    """
    from blip_scale.storage import run_folder

    with tempfile.TemporaryDirectory(prefix="gpu-report-") as name:
        folder = Path(name)
        run = folder / "run"
        overrides = [f"output_dir={run}"]
        overrides += _noise(folder) if settings.tiny else _demo_data(settings.demo_data)
        command = [sys.executable, str(ROOT / "blip_scale" / "train.py"), "--recipe", "demo"]
        command += ["--deepspeed", str(ROOT / "ds_configs" / "zero3.json"), *overrides]
        began = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        seconds = time.monotonic() - began
        if code:
            raise RuntimeError(f"the demo ended with exit code {code}")
        summary = json.loads((run / run_folder.SUMMARY).read_text(encoding="utf-8"))
    rows.add(what="demo", command_seconds=round(seconds, 1), **summary)


def _demo_data(folder: Path) -> list[str]:
    """Settings that read the demo's data from a folder. Missing data are created."""
    if not (folder / "emoji").is_dir():
        command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "demo", str(folder)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise RuntimeError(f"no demo data in {folder}: give --demo-data")
    streams = []
    for name in ("emoji", "vendors"):
        streams.append({"name": name, "local": str(folder / name)})
    heldout = [
        {"name": name, "local": str(folder / name)}
        for name in ("heldout_drawing", "heldout_concept")
    ]
    return [
        f"data.streams={json.dumps(streams)}",
        f"data.heldout={json.dumps(heldout)}",
        f"model.text.checkpoint={folder / 'text'}",
    ]


def _noise(folder: Path) -> list[str]:
    from blip_scale.config import recipe
    from tools.benchmarks.gpu_step import TINY
    from tools.benchmarks.growth import OFFLINE
    from tools.benchmarks.step_contenders import make_match
    from tools.benchmarks.vocabulary import make_tokenizer

    small = [
        *OFFLINE, *TINY, f"model.text.tokenizer={make_tokenizer(folder / 'tokenizer', 500)}",
        "train.global_batch_size=4", "train.max_steps=2",
    ]  # fmt: skip
    match = make_match(recipe.load("demo", small), "", 1, folder)
    stream = {"name": "noise", "local": match.recipe.data.streams[0].local}
    return [*small, f"data.streams={json.dumps([stream])}"]


def all_parts() -> dict[str, Part]:
    """Parts by name, most important first, because time may run out."""
    parts = [
        Part("environment", 60, 5, environment, ("torch",)),
        Part("step bf16 64", 150, 60, step("bf16", 64), _STEP_NEEDS),
        Part("step bf16 256", 150, 60, step("bf16", 256), _STEP_NEEDS),
        Part("tests", 90, 15, gpu_tests, ("torch", "pytest", "pytest_timeout")),
        Part("attention", 80, 15, attention, ("torch",)),
        Part("step bf16 90", 120, 60, step("bf16", 90), _STEP_NEEDS),
        Part("demo", 180, 60, demo, _STEP_NEEDS),
        Part("step bf16 512", 120, 60, step("bf16", 512), _STEP_NEEDS),
        Part("step fp32 90", 120, 60, step("fp32", 90), _STEP_NEEDS),
    ]
    return {part.name: part for part in parts}
