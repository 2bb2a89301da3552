"""tools/benchmark.py: its output, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import benchmark

REPO = Path(__file__).resolve().parent.parent
TINY = [
    "model.vision.name=vit_tiny_patch16_224",
    "model.vision.image_size=64",
    "model.vision.overrides={patch_size: 16, embed_dim: 48, depth: 2, num_heads: 3}",
    *("model.text.layers=2", "model.text.width=48", "model.text.heads=4"),
    *("model.text.mlp_width=96", "model.embed_dim=16", "objective.queue_size=64"),
]


def test_the_waiting_share_leaves_the_first_point_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        benchmark.data_wait_share(tmp_path)
    points = [{"speed/data_wait_share": share} for share in (0.9, 0.01, 0.03)]
    lines = [json.dumps(point) for point in [*points, {"heldout/recall": 1.0}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert benchmark.data_wait_share(tmp_path) == 0.02
    (tmp_path / "metrics.jsonl").write_text(lines[0])
    with pytest.raises(ValueError, match="fewer than two points"):
        benchmark.data_wait_share(tmp_path)


@pytest.mark.multiprocess
def test_the_data_benchmark_runs() -> None:
    command = [sys.executable, REPO / "tools" / "benchmark.py", "data", "--json"]
    command += ["--sizes", "64x48", "--rounds", "1", "--workers", "1", "--crop", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    result = json.loads(done.stdout)
    rates = result["sizes"]["64x48"]
    for name in ("images_per_s", "published_images_per_s", "ratio", "webdataset_images_per_s"):
        assert rates[name] > 0
    assert "decode to tensor" in benchmark.table(result)


@pytest.mark.multiprocess
def test_the_step_benchmark_runs(tmp_path: Path) -> None:
    """At a tiny size: every figure is there, and the parts of a step make the whole."""
    command = [sys.executable, REPO / "tools" / "benchmark.py", "step", "--json"]
    command += ["--batch-size", "4", "--rounds", "1", "--against", "published"]
    command += ["--trace", tmp_path / "trace.json", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("samples_per_s", "published_samples_per_s", "ratio", "mfu", "gflop_per_sample"):
        assert result[name] > 0
    assert result["ratio"] == pytest.approx(
        result["published_step_seconds"] / result["step_seconds"], rel=0.01
    )
    assert {"vision backward", "sweep forward", "optimizer"} <= set(result["split_seconds"])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "GFLOP a sample" in benchmark.step_table(result)
