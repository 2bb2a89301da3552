"""Simulate the goodput of runs on a cluster with failures: `benchmark.py goodput`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from blip_scale.planning.failures import (  # noqa: E402
    Costs,
    best_interval_s,
    goodput,
    mean_time_between_s,
)
from blip_scale.storage import run_folder  # noqa: E402

DAY_S = 86_400.0
GOAL = 0.99
ASSUMED = Costs(pause_s=1.0, write_s=5.0)
_HELP = {
    "pause_s": "pause for a checkpoint",
    "write_s": "time from the pause until it is committed",
    "restart_s": "time from the end of the first rank to the next step",
    "hang_limit_s": "time until a hang is noticed",
    "hang_share": "share of the failures that are hangs",
}


@dataclass(frozen=True)
class Case:
    """A cluster and a run on it."""

    costs: Costs
    between_s: float
    """Mean seconds between two failures."""
    interval_s: float
    """Seconds of training between two checkpoints."""
    evaluation_s: float = 0.0
    """Seconds of an evaluation."""
    evaluate_every: int = 0
    """Number of checkpoints between two evaluations; 0 for no evaluation."""


@dataclass
class _Run:
    """State of a simulated run."""

    case: Case
    rng: np.random.Generator
    now: float = 0.0
    failure: float = 0.0
    """Time of the next failure."""
    work: float = 0.0
    """Seconds of completed steps, including those not in a checkpoint yet."""
    committed: float = 0.0
    """Seconds of steps in the newest committed checkpoint."""

    def __post_init__(self) -> None:
        self.spent = dict.fromkeys(
            ("steps", "start", "evaluation", "saving", "repeated", "down"), 0.0
        )
        self.writing: deque[tuple[float, float]] = deque()
        """Checkpoints being written: (time of the commit, seconds of steps)."""
        self._draw_failure()

    def _draw_failure(self) -> None:
        self.failure = self.now + self.rng.exponential(self.case.between_s)

    def pass_time(self, use: str, seconds: float) -> bool:
        """Spend time on one use. Returns False if a failure interrupts it."""
        end = self.now + seconds
        survives = self.failure > end
        self.spent[use] += (end if survives else self.failure) - self.now
        self.now = end if survives else self.failure
        while self.writing and self.writing[0][0] <= self.now:
            self.committed = self.writing.popleft()[1]
        return survives

    def lose(self) -> None:
        """Lose the work that is not committed, and wait until the failure is detected."""
        lost_s = self.spent["steps"] - self.committed
        self.spent["steps"] -= lost_s
        self.spent["repeated"] += lost_s
        self.writing.clear()
        costs = self.case.costs
        if self.rng.random() < costs.hang_share:
            self.now += costs.hang_limit_s
            self.spent["down"] += costs.hang_limit_s
        self._draw_failure()

    def train(self, until: float) -> None:
        """Start the run, and train until a failure or the end."""
        case, costs = self.case, self.case.costs
        saves = 0
        if not self.pass_time("start", costs.restart_s):
            return
        while self.now < until:
            if not self.pass_time("steps", case.interval_s):
                return
            work = self.spent["steps"]
            if not self.pass_time("saving", costs.pause_s):
                return
            self.writing.append((self.now + costs.write_s, work))
            saves += 1
            is_due = case.evaluate_every and saves % case.evaluate_every == 0
            if is_due and not self.pass_time("evaluation", case.evaluation_s):
                return


def simulate(case: Case, seconds: float, rng: np.random.Generator) -> dict[str, float]:
    """Shares of the wall time of one run by use; `steps` is the goodput.

    Failures occur at random times, also during restarts. The run begins with a start.
    """
    run = _Run(case, rng)
    while run.now < seconds:
        run.train(seconds)
        if run.now < seconds:
            run.lose()
    return {use: spent / run.now for use, spent in run.spent.items()}


def months(case: Case, count: int, days: float, seed: int) -> list[dict[str, float]]:
    """Shares of the wall time in `count` simulated months."""
    rng = np.random.default_rng(seed)
    return [simulate(case, days * DAY_S, rng) for _ in range(count)]


def measured(run: Path) -> dict[str, float]:
    """Read costs from the folder of a run. Costs without data are left out.

    - `pause_s`, `write_s`: medians of its checkpoints.
    - `restart_s`: median time from the end of the first rank to the next logged step, over the
      failures in attempts.json.
    - `hang_limit_s`: median limit of the hangs in stalls.jsonl.

    Raises:
        OSError: the folder holds no run.
    """
    points = _json_lines(run / run_folder.METRICS)
    costs: dict[str, float] = {}
    for name in ("pause_s", "write_s"):
        values = [point[f"checkpoint/{name}"] for point in points if f"checkpoint/{name}" in point]
        if values:
            costs[name] = statistics.median(values)
    stepped = [point["time"] for point in points if "loss/total" in point]
    restarts = []
    attempts = run / run_folder.ATTEMPTS
    for attempt in json.loads(attempts.read_text()) if attempts.exists() else []:
        later = [time for time in stepped if time > attempt["failed_at"]]
        if attempt["failed"] and later:
            restarts.append(later[0] - attempt["failed_at"])
    if restarts:
        costs["restart_s"] = statistics.median(restarts)
    stalls = run / run_folder.STALLS
    if stalls.exists():
        costs["hang_limit_s"] = statistics.median(s["limit_s"] for s in _json_lines(stalls))
    return costs


def _json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def costs_and_sources(options: argparse.Namespace) -> tuple[Costs, dict[str, str]]:
    """Costs of the planned case, and the source of each: measured, given as option, or assumed."""
    costs = asdict(ASSUMED)
    sources = dict.fromkeys(costs, "assumed")
    from_run = measured(options.run) if options.run else {}
    for name in costs:
        if getattr(options, name) is not None:
            costs[name], sources[name] = getattr(options, name), "given"
        elif name in from_run:
            costs[name], sources[name] = from_run[name], f"measured in {options.run}"
    return Costs(**costs), sources


def cases(options: argparse.Namespace) -> dict[str, Case]:
    """Cases of the table: the planned one first, then variants with one change each."""
    costs, _ = costs_and_sources(options)
    between_s = 7 * DAY_S / options.failures_a_week
    best_s = best_interval_s(costs, between_s)
    planned = Case(costs, between_s, best_s)
    slow_notice = replace(costs, hang_limit_s=1800.0)
    queued = replace(costs, restart_s=1200.0)
    often_s = mean_time_between_s(26.0, options.nodes)
    return {
        f"best interval, {best_s:.0f} s": planned,
        "checkpoint every 250 s": replace(planned, interval_s=250.0),
        "checkpoint every hour": replace(planned, interval_s=3600.0),
        "hangs noticed after 30 minutes": replace(planned, costs=slow_notice),
        "restart through a queue of 20 minutes": replace(planned, costs=queued),
        "pause of 30 s (a checkpoint that blocks)": Case(
            replace(costs, pause_s=30.0), between_s,
            best_interval_s(replace(costs, pause_s=30.0), between_s),
        ),
        "26 failures per 1,000 node-days": Case(
            costs, often_s, best_interval_s(costs, often_s)
        ),
        "evaluation of 5 s every 1,250 s": _evaluated(planned, 1250.0, 5.0),
        "evaluation of 60 s every 1,250 s": _evaluated(planned, 1250.0, 60.0),
    }  # fmt: skip


def _evaluated(case: Case, every_s: float, seconds: float) -> Case:
    count = max(1, round(every_s / case.interval_s))
    return replace(case, interval_s=every_s / count, evaluation_s=seconds, evaluate_every=count)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Simulated goodput of every case, and the longest restart that still gives 99 %."""
    rows = {}
    for name, case in cases(options).items():
        shares = months(case, options.months, options.days, options.seed)
        steps = sorted(month["steps"] for month in shares)
        means = {use: statistics.fmean(month[use] for month in shares) for use in shares[0]}
        rows[name] = {
            **asdict(case.costs),
            "interval_s": case.interval_s,
            "goodput": means["steps"],
            "worst_in_20": steps[len(steps) // 20],
            "closed_form": None if case.evaluate_every else goodput(
                case.interval_s, case.costs, case.between_s
            ),
            "longest_restart_s": None if case.evaluate_every else _longest_restart_s(case),
            "shares": means,
        }  # fmt: skip
    costs, sources = costs_and_sources(options)
    return {
        "nodes": options.nodes, "failures_a_week": options.failures_a_week,
        "costs": asdict(costs), "sources": sources, "cases": rows,
    }  # fmt: skip


def _longest_restart_s(case: Case) -> float:
    """Longest restart with which the closed form reaches the goal; 0 if none does."""
    low, high = 0.0, case.between_s
    for _ in range(50):
        middle = (low + high) / 2
        costs = replace(case.costs, restart_s=middle)
        if goodput(case.interval_s, costs, case.between_s) >= GOAL:
            low = middle
        else:
            high = middle
    return low


def show(result: dict[str, Any]) -> str:
    """The result as two Markdown tables: assumed and measured times, and the cases."""
    lines = ["| time | value | source |", "|---|---|---|"]
    for name, value in result["costs"].items():
        lines.append(f"| {name} | {value:g} | {result['sources'][name]} |")
    lines += [
        "",
        "| case | goodput | worst month of 20 | closed form | repeated | down, start | "
        "longest restart for 99 %, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["cases"].items():
        shares, closed, longest = row["shares"], row["closed_form"], row["longest_restart_s"]
        cells = [
            name,
            f"{row['goodput']:.2%}",
            f"{row['worst_in_20']:.2%}",
            "" if closed is None else f"{closed:.2%}",
            f"{shares['repeated']:.2%}",
            f"{shares['down'] + shares['start']:.2%}",
            "" if longest is None else f"{longest:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def add_goodput(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "goodput",
        help="simulated goodput of a month on a cluster with failures",
        description="Simulate runs with random failures, restarts, hangs and checkpoints that are "
        "written in the background, and compare them with Daly's closed form. Options and the "
        "measured times of a run (--run) replace the assumed times.",
    )
    add = command.add_argument
    add("--nodes", type=int, default=32, help="default: 32")
    add(
        "--failures-a-week",
        type=float,
        default=3.0,
        help="failures of the whole cluster (default: 3)",
    )
    add("--days", type=float, default=30.0, help="length of a simulated run (default: 30)")
    add("--months", type=int, default=400, help="simulated runs of each case (default: 400)")
    add("--seed", type=int, default=0)
    for name, value in asdict(ASSUMED).items():
        option = f"--{name.replace('_', '-')}"
        add(option, type=float, help=f"{_HELP[name]} (assumed: {value:g})")
    add("--run", type=Path, help="folder of a run, whose measured times replace the assumed ones")
    add("--json", action="store_true", help="print one JSON object")
    command.set_defaults(measure=measure, show=show)
