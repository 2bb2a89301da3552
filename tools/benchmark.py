"""Measure the framework's speed on this machine: `python tools/benchmark.py data`, `step`, `host`,
`growth`, `scale`, `objectives` or `goodput`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from blip_scale.config import recipe  # noqa: E402
from blip_scale.storage import run_folder  # noqa: E402

SIZES = ("500x375", "640x480", "1280x960")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    if getattr(options, "at_least", None) is not None and "published" not in options.against:
        print("error: --at-least: needs --against published", file=sys.stderr)
        return 2
    try:
        result = options.measure(options)
    except ModuleNotFoundError as error:
        print(f"error: {error}; run `pip install -r requirements-dev.txt`", file=sys.stderr)
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if options.json else options.show(result))
    at_least = getattr(options, "at_least", None)
    if at_least is not None and result["ratio"] < at_least:
        print(f"error: ratio {result['ratio']:.2f} is below {at_least}", file=sys.stderr)
        return 1
    return 0


def data(options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of every contender at every image size, and a run's waiting share."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # all figures are per core
    from tools.benchmarks.data_contenders import DataContest, Trial

    sizes = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, DataContest() as contest:
        for name in options.sizes:
            width, height = (int(side) for side in name.split("x"))
            trial = Trial(Path(folder) / name, (width, height), options.crop, options.workers)
            kilobytes = trial.write(options.photos)
            rates = contest.rates(trial, options.rounds)
            sizes[name] = {"kb_per_image": kilobytes, **_summary(rates)}
    result: dict[str, Any] = {"unit": "images/s", "workers": options.workers, "sizes": sizes}
    if options.run:
        result["data_wait_share"] = data_wait_share(options.run)
    return result


def _summary(rates: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of rates and their ratios. Contenders take turns in each round."""

    def ratio(ours: str, other: str) -> float:
        pairs = zip(rates[ours], rates[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    return {
        "images_per_s": _median(rates["fast"]),
        "published_images_per_s": _median(rates["published"]),
        "ratio": ratio("fast", "published"),
        "exact_images_per_s": _median(rates["exact"]),
        "exact_ratio": ratio("exact", "published"),
        "decode_images_per_s": _median(rates["decode"]),
        "published_decode_images_per_s": _median(rates["published_decode"]),
        "decode_ratio": ratio("decode", "published_decode"),
        "transform_images_per_s": _rest(rates["exact"], rates["decode"]),
        "published_transform_images_per_s": _rest(rates["published"], rates["published_decode"]),
        "loader_images_per_s": _median(rates["loader"]),
        "webdataset_images_per_s": _median(rates["webdataset"]),
        "loader_ratio": ratio("loader", "webdataset"),
        "loader_workers_images_per_s": _median(rates["loader_workers"]),
        "webdataset_workers_images_per_s": _median(rates["webdataset_workers"]),
        "loader_workers_ratio": ratio("loader_workers", "webdataset_workers"),
    }


def _median(rates: list[float]) -> float:
    return round(statistics.median(rates), 1)


def _rest(whole: list[float], part: list[float]) -> float:
    """Rate of the remaining work without `part`."""
    return _median([1 / (1 / a - 1 / b) for a, b in zip(whole, part, strict=True)])


def data_wait_share(run: Path) -> float:
    """Mean share of a step spent waiting for data, without the first logged point.

    Raises:
        FileNotFoundError: the run logged no metrics.
        ValueError: the metrics hold fewer than two points.
    """
    path = run / run_folder.METRICS
    points = [json.loads(line) for line in path.read_text().splitlines()]
    shares = [p["speed/data_wait_share"] for p in points if "speed/data_wait_share" in p]
    if len(shares) < 2:
        raise ValueError(f"{path} holds fewer than two points of speed/data_wait_share")
    return round(statistics.fmean(shares[1:]), 5)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    workers = result["workers"]
    rows = [
        ("decode to tensor: fast", "images_per_s", "ratio"),
        ("decode to tensor: exact", "exact_images_per_s", "exact_ratio"),
        ("  published", "published_images_per_s", ""),
        ("decoding alone", "decode_images_per_s", "decode_ratio"),
        ("  published (Pillow)", "published_decode_images_per_s", ""),
        ("transform alone", "transform_images_per_s", ""),
        ("  published", "published_transform_images_per_s", ""),
        ("loader, no workers", "loader_images_per_s", "loader_ratio"),
        ("  webdataset, published", "webdataset_images_per_s", ""),
        (f"loader, {workers} workers", "loader_workers_images_per_s", "loader_workers_ratio"),
        ("  webdataset, published", "webdataset_workers_images_per_s", ""),
    ]
    sizes = result["sizes"]
    heads = [f"{name} ({size['kb_per_image']} kB)" for name, size in sizes.items()]
    lines = [f"{'images/s':26}" + "".join(f"{head:>24}" for head in heads)]
    for title, rate, ratio in rows:
        line = f"{title:26}"
        for size in sizes.values():
            times = f"  ({size[ratio]:.2f}x)" if ratio else "         "
            cell = f"{size[rate]:.0f}{times}"
            line += f"{cell:>24}"
        lines.append(line)
    lines.append(
        "Per core; with workers, of all cores. (x): median ratio to the published transform or "
        "loader."
    )
    if "data_wait_share" in result:
        lines.append(f"share of a step that waits for data: {result['data_wait_share']:.2%}")
    return "\n".join(lines)


def step(options: argparse.Namespace) -> dict[str, Any]:
    """Time, operations and memory of our pretraining step and of the published step."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from tools.benchmarks.step_contenders import ALLOCATOR, Contender, StepContest, make_match

    if options.allocator == "tuned":
        os.environ.update(ALLOCATOR)  # applies to all contenders, which read it at their start
    chosen = recipe.load(options.recipe, [*_step_settings(options), *options.settings])
    names = ["ours", *options.against]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        match = make_match(chosen, options.deepspeed, options.threads, Path(folder))
        with StepContest({name: Contender(name, match) for name in names}) as contest:
            seconds: dict[str, list[float]] = {name: [] for name in names}
            peaks = []
            for _ in range(options.rounds):
                peaks.append(contest.ask("ours", "peak_flops"))
                for name in names:
                    seconds[name].append(contest.ask(name, "seconds"))
            memory = {name: contest.ask(name, "peak_memory_gib") for name in names}
            described = {k: v for name in names for k, v in contest.ask(name, "describe").items()}
            split = contest.ask("ours", "split")
            flops = contest.ask("ours", "flops")
            host = {name: contest.ask(name, "host_work") for name in names}
            if options.trace:
                contest.ask("ours", "trace", options.trace)
    batch = chosen.train.global_batch_size
    own_s = statistics.median(seconds["ours"])
    result = {
        "precision": chosen.train.precision,
        "batch_size": batch,
        "threads": options.threads,
        "allocator": options.allocator,
        **described,
        "step_seconds": own_s,
        "samples_per_s": batch / own_s,
        "gflop_per_sample": flops / batch / 1e9,
        "peak_gflops": max(peaks) / 1e9,
        "mfu": flops / own_s / max(peaks),
        "peak_memory_gib": memory["ours"],
        **host["ours"],
        "split_seconds": split,
    }
    for name in options.against:
        pairs = zip(seconds[name], seconds["ours"], strict=True)
        other_s = statistics.median(seconds[name])
        result |= {
            f"{name}_step_seconds": other_s,
            f"{name}_samples_per_s": batch / other_s,
            f"{name}_peak_memory_gib": memory[name],
            _ratio(name): statistics.median(a / b for a, b in pairs),
            **{f"{name}_{what}": number for what, number in host[name].items()},
        }
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}


def _ratio(against: str) -> str:
    """Key of the ratio of the speeds; `ratio` is that to the published step."""
    return "ratio" if against == "published" else f"{against}_ratio"


def _step_settings(options: argparse.Namespace) -> list[str]:
    """Settings that adapt the recipe to one rank."""
    from tools.benchmarks.growth import OFFLINE

    return [
        f"train.precision={options.precision}",
        f"train.global_batch_size={options.batch_size}",
        f"train.micro_batch_size={options.batch_size}",  # no contender accumulates
        *OFFLINE,
    ]


def step_table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['precision']}, batch {result['batch_size']}, {result['threads']} threads, "
        f"{result['token_mean']:.1f} tokens a caption, allocator {result['allocator']}",
        f"{'':12}{'s a step':>10}{'samples/s':>12}{'GiB':>8}",
        f"{'ours':12}{result['step_seconds']:10.3f}{result['samples_per_s']:12.3f}"
        f"{result['peak_memory_gib']:8.2f}",
    ]
    for name in ("published", "plain"):
        if _ratio(name) in result:
            lines.append(
                f"{name:12}{result[f'{name}_step_seconds']:10.3f}"
                f"{result[f'{name}_samples_per_s']:12.3f}{result[f'{name}_peak_memory_gib']:8.2f}"
                f"  ours is {result[_ratio(name)]:.2f} times as fast (median over rounds)"
            )
    lines.append(
        f"{result['gflop_per_sample']:.1f} GFLOP a sample; {result['mfu']:.0%} of the "
        f"{result['peak_gflops']:.0f} GFLOP/s of a matrix product in this run"
    )
    for name, prefix in (("ours", ""), ("published", "published_"), ("plain", "plain_")):
        if not prefix or _ratio(name) in result:
            lines.append(
                f"{name:12}{result[f'{prefix}operations']:,} operations on tensors a step, "
                f"{result[f'{prefix}python_calls']:,} calls of Python functions"
            )
    whole = sum(result["split_seconds"].values())
    for part, seconds in result["split_seconds"].items():
        lines.append(f"  {part:24}{seconds:8.3f} s {seconds / whole:6.1%}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    from tools.benchmarks.goodput import add_goodput
    from tools.benchmarks.growth import add_growth
    from tools.benchmarks.host import add_host
    from tools.benchmarks.objectives import add_objectives
    from tools.benchmarks.scale import add_scale

    commands = parser.add_subparsers(required=True, metavar="WHAT")
    add_growth(commands, ROOT / "ds_configs" / "zero3.json")
    add_host(commands, ROOT / "ds_configs" / "zero3.json")
    add_scale(commands)
    add_objectives(commands)
    add_goodput(commands)
    _add_step(
        commands.add_parser(
            "step",
            help="time, operations and memory of a pretraining step, ours and the published one",
            description="Measure one optimizer step of a recipe on one rank under the DeepSpeed "
            "engine: seconds, samples/s, FLOPs (torch's counter), share of the matrix product peak "
            "of the same run, peak memory, and time of each part. Images are noise, captions have "
            "12.5 tokens on average. Each contender runs in its own process, and they take turns.",
        )
    )
    command = commands.add_parser(
        "data",
        help="speed of decoding, transforms and loaders, ours, published, and webdataset",
        description="Measure images per second and core, from an encoded JPEG to a training "
        "tensor, with our transforms, with the published transform (Pillow, torchvision, OpenCV; "
        "float32 output), and with complete loaders. Our loader reads MDS shards and tokenizes. "
        "webdataset reads a tar of the same images with the published transform, without tokens. "
        "Each contender runs in its own process, and they take turns in each round.",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--sizes", nargs="+", default=SIZES, metavar="WxH", help="default: all 3")
    command.add_argument("--rounds", type=int, default=7, help="default: 7")
    command.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="default: one a core"
    )
    command.add_argument(
        "--crop", type=int, default=224, help="side of the output in pixels (default: 224)"
    )
    command.add_argument(
        "--photos", type=Path, help="folder of your own photos (default: scikit-image's)"
    )
    command.add_argument(
        "--run", type=Path, help="also show the share of this run's steps spent waiting for data"
    )
    command.set_defaults(measure=data, show=table)
    return parser


def _add_step(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "settings", nargs="*", metavar="SETTING=VALUE", help="settings of the recipe"
    )
    command.add_argument("--recipe", default="base_129M", help="default: base_129M")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    command.add_argument("--batch-size", type=int, default=8, help="default: 8")
    command.add_argument(
        "--rounds", type=int, default=5, help="timed steps per contender (default: 5)"
    )
    command.add_argument(
        "--against", choices=("published", "plain"), action="append", default=[],
        help="also time the step of the published code, or ours without DeepSpeed",
    )  # fmt: skip
    command.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core"
    )
    command.add_argument(
        "--allocator", choices=("tuned", "plain"), default="tuned",
        help="let glibc keep large blocks (default) or return them; same for all contenders",
    )  # fmt: skip
    command.add_argument("--deepspeed", default=str(ROOT / "ds_configs" / "zero3.json"))
    command.add_argument(
        "--at-least", type=float, metavar="RATIO",
        help="fail if the ratio to the published step is lower",
    )  # fmt: skip
    command.add_argument("--trace", type=Path, help="write a step for Perfetto or TensorBoard")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(measure=step, show=step_table)


if __name__ == "__main__":
    sys.exit(main())
