"""tools/benchmark.py: that it runs, and its output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blip_scale.config import recipe as recipes
from tools import benchmark
from tools.benchmarks import growth, objectives, scale
from tools.benchmarks.host import host_table

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


def test_the_table_of_objectives_is_read_from_finished_runs(tmp_path: Path) -> None:
    """A finished run is not repeated. Figures that a choice of losses lacks are a dash."""
    for seed, recall in ((0, 0.1), (1, 0.3)):
        run = tmp_path / f"no_LM_{seed}"
        run.mkdir()
        figures = {"seen/itc_image_to_text_r10": recall, "seen/itc_text_to_image_r10": 0.5}
        (run / "summary.json").write_text(json.dumps({"evaluation": figures}))
        points = [
            {"step": 10, "samples": 640, "speed/samples_per_s": 1.0, "memory/peak_gib": 1.0},
            {"step": 20, "samples": 1280, "speed/samples_per_s": 128.0, "memory/peak_gib": 1.5},
        ]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, points)))
    arguments = ["objectives", "--variants", "no LM", "--seeds", "2", "--out", str(tmp_path)]
    options = benchmark._parser().parse_args(arguments)
    table = options.show(options.measure(options)).splitlines()
    assert table[-1] == "| no LM | 20.0 ± 14.1 % | 50.0 ± 0.0 % | - | - | 0.500 | 1.50 |"
    variants = set()
    for settings in objectives.VARIANTS.values():
        epochs = [text.replace("SHARE_60", "3").replace("SHARE_90", "5") for text in settings]
        variants.add(recipes.to_yaml(recipes.load("demo", epochs)))
    assert len(variants) == len(objectives.VARIANTS)


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
    """At a tiny size, all figures are there, and the parts of a step add up."""
    command = [sys.executable, REPO / "tools" / "benchmark.py", "step", "--json"]
    command += ["--batch-size", "4", "--rounds", "1", "--trace", tmp_path / "trace.json"]
    command += ["--against", "published", "--against", "plain", *TINY, "--at-least", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and "is below 1000" in done.stderr, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("samples_per_s", "published_samples_per_s", "ratio", "mfu", "gflop_per_sample"):
        assert result[name] > 0
    for against, ratio in (("published", "ratio"), ("plain", "plain_ratio")):
        assert result[ratio] == pytest.approx(
            result[f"{against}_step_seconds"] / result["step_seconds"], rel=0.01
        )
    assert result["operations"] < 0.6 * result["published_operations"]
    assert result["plain_python_calls"] < result["python_calls"]
    assert {"vision backward", "sweep forward", "optimizer"} <= set(result["split_seconds"])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "published " in benchmark.step_table(result)
    del result["ratio"]  # as where ours ran against plain alone
    table = benchmark.step_table(result)
    assert "GFLOP a sample" in table and "plain " in table and "published" not in table


def test_a_ratio_needs_the_published_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["step", "--at-least", "1.5"]) == 2
    assert "needs --against published" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_the_host_benchmark_runs() -> None:
    """With two layers, our step has fewer operations than the published one, and the engine runs
    more Python."""
    command = [sys.executable, REPO / "tools" / "benchmark.py", "host", "--json", "--rounds", "2"]
    command += ["--batch-size", "2", "model.text.layers=2", "model.text.heads=4"]
    command += ["model.vision.overrides={embed_dim: 48, depth: 2, num_heads: 4}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    contenders = result["contenders"]
    for row in contenders.values():
        assert 0 < row["least_cpu_seconds"] <= row["cpu_seconds"]
    assert contenders["ours"]["operations"] < 0.7 * contenders["published"]["operations"]
    assert contenders["plain"]["python_calls"] < contenders["ours"]["python_calls"]
    assert 0 < result["plain_to_published"] < 10  # a busy machine, two rounds
    assert "ours, ZeRO-3 / published form: " in host_table(result)


AXES = {"batch": [2, 4, 8], "image": [32], "tokens": [8], "queue": [64], "ranks": [1, 2]}


def figures_at(point: growth.Point) -> dict[str, float]:
    """Figures of a step that costs twice its due at batch 8."""
    work = point.batch * (2 if point.batch == 8 else 1)
    memory = {"held_gib": 1.0 + point.batch, "paper_gib": 1.0 + point.batch}
    return {"compute_s": 0.1 * work, "gflop": point.batch, "paper_gflop": point.batch, **memory}


def test_what_grows_faster_than_its_mathematics_is_named() -> None:
    base = growth.base_point(AXES, threads=4)
    assert base == growth.Point(4, 32, 8, 64, ranks=1, threads=4)
    points: list[growth.Point] = []

    def measure(point: growth.Point) -> dict[str, float]:
        points.append(point)
        return figures_at(point)

    axes = {name: growth.measure_axis(name, AXES[name], base, measure) for name in AXES}
    assert [row["batch"] for row in axes["batch"]] == [2, 4, 8]
    assert {point.threads for point in points if point.ranks == 2} == {2}  # of four cores
    steps = {name: growth.growth_of(name, axes[name]) for name in ("batch", "ranks")}
    (first, second) = steps["batch"]
    assert first["time"]["exponent"] == first["time"]["due_exponent"] == pytest.approx(1.0)
    assert second["time"]["exponent"] == pytest.approx(2.0)
    (line,) = growth.faster(steps, 0.1)
    assert line.startswith("batch 4 to 8: time grows 4.00 times (exponent 2.00), its FLOPs 2.00")
    assert not growth.faster(steps, 1.0)


@pytest.mark.multiprocess
def test_the_growth_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a tiny size, on one and two ranks, FLOPs grow by formula, and the plot is an SVG."""
    assert benchmark.main(["growth", "--plot", "curve.txt"]) != 0
    assert "ends in .svg, .png or .pdf" in capsys.readouterr().err
    command = [sys.executable, REPO / "tools" / "benchmark.py", "growth", "--json", *TINY]
    command += ["--batch", "2", "4", "--image", "64", "--tokens", "8", "--queue", "64"]
    command += ["--rounds", "1", "--threads", "1", "--ranks", "1", "2"]
    picture = tmp_path / "growth.svg"
    done = subprocess.run([*command, "--plot", picture], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    (step,) = result["growth"]["batch"]
    assert step["FLOPs"]["factor"] == pytest.approx(step["FLOPs"]["due"], rel=0.02)
    single, double = result["axes"]["ranks"]
    assert single["exchange_gb"] < 0.1 * double["exchange_gb"]  # a single rank sums nothing
    assert "exponents with respect to the quantity" in growth.growth_table(result).lower()
    assert "<svg" in picture.read_text()


@pytest.mark.multiprocess
def test_the_scale_benchmark_runs_and_more_shards_cost_a_sample_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shards", "300", "1200", "--rounds", "2", "--scratch", str(tmp_path)]
    assert benchmark.main(["scale", "--json", *arguments, "--records", "20000", "40000"]) == 0
    result = json.loads(capsys.readouterr().out)
    few, many = result["shards"]["300"], result["shards"]["1200"]
    assert set(few) == set(many) == {figure for _, figure in scale.ROWS}
    assert many["inventory_bytes"] - few["inventory_bytes"] < 10
    assert many["sample_us"] < 3 * few["sample_us"]  # a busy machine; four times the shards
    assert set(result["merge"]["records"]) == {"20000", "40000"}
    assert not list(tmp_path.iterdir())
