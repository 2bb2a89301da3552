"""Prepare a data set as MDS shards: `python tools/prepare_data.py demo data/demo`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from blip_scale.data.sources import demo


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    start_s = time.perf_counter()
    try:
        summary = demo.prepare(options.out, _progress, options.size)
    except ModuleNotFoundError as error:
        print(f"error: {error}; run `pip install -r requirements-demo.txt`", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{name} {count}" for name, count in summary["pairs"].items())
    done = (
        "was there already"
        if summary["reused"]
        else f"made in {time.perf_counter() - start_s:.0f} s"
    )
    print(f"{options.out}: {done}; pairs: {counts}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    parser_demo = sources.add_parser(
        "demo", help="emoji drawings and icons that Python packages ship"
    )
    parser_demo.add_argument("out", type=Path, metavar="OUT", help="folder to make, e.g. data/demo")
    parser_demo.add_argument(
        "--size",
        type=int,
        default=demo.IMAGE_SIZE,
        help="side of the pictures in pixels (%(default)s)",
    )
    return parser


def _progress(items: Iterable, total: int) -> Iterable:
    return tqdm(items, total=total, desc="rendering", unit="picture", mininterval=1.0)


if __name__ == "__main__":
    sys.exit(main())
