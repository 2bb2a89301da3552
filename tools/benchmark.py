"""Measure the speed of the framework on this machine: `python tools/benchmark.py data`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # everything is counted per core
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = ("500x375", "640x480", "1280x960")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        result = options.measure(options)
    except ModuleNotFoundError as error:
        print(f"error: {error}; run `pip install -r requirements-dev.txt`", file=sys.stderr)
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if options.json else options.show(result))
    return 0


def data(options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of every contender at every size, and the waiting share of a run."""
    from data_contenders import Contest, Trial

    sizes = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, Contest() as contest:
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
    """Medians; ratios are medians over the rounds, in which all contenders took turns."""

    def ratio(ours: str, theirs: str) -> float:
        pairs = zip(rates[ours], rates[theirs], strict=True)
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
    """Rate of what is done besides `part`."""
    return _median([1 / (1 / a - 1 / b) for a, b in zip(whole, part, strict=True)])


def data_wait_share(run: Path) -> float:
    """Mean share of its steps that a run waited for data, without the first logged point.

    Raises FileNotFoundError or ValueError where the run logged no such thing.
    """
    path = run / "metrics.jsonl"
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
        cells = [
            f"{size[rate]:.0f}" + (f"  ({size[ratio]:.2f}x)" if ratio else "         ")
            for size in sizes.values()
        ]
        lines.append(f"{title:26}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append("a core; with workers: in all. (x): median over rounds against the published way.")
    if "data_wait_share" in result:
        lines.append(f"share of a step that waits for data: {result['data_wait_share']:.2%}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    command = commands.add_parser(
        "data",
        help="decoding, transforms and loaders, against the published transform and webdataset",
        description="Images per second from an encoded JPEG to a training tensor, a core: the "
        "framework's paths, the published transform (Pillow, torchvision, OpenCV; float32 out) "
        "and whole loaders (ours from MDS shards, with tokens; webdataset from a tar of the same "
        "images, published transform, without tokens). Every contender is a process of its own, "
        "as loader workers are; they take turns within each round.",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--sizes", nargs="+", default=SIZES, metavar="WxH", help="default: all 3")
    command.add_argument("--rounds", type=int, default=7, help="default: 7")
    command.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="default: one a core"
    )
    command.add_argument("--crop", type=int, default=224, help="side of the result (default: 224)")
    command.add_argument(
        "--photos", type=Path, help="folder of your own photos (default: scikit-image's)"
    )
    command.add_argument("--run", type=Path, help="also: waiting share of this run's steps")
    command.set_defaults(measure=data, show=table)
    return parser


if __name__ == "__main__":
    sys.exit(main())
