"""Markdown tables of `gpu_report.py`, with measured figures only and one number per cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
_PEAK_OF = {"bf16": "bf16", "fp32": "fp32"}
"""Precision of a step -> kind of matrix product that gives its peak."""


def markdown(states: Sequence[Row], rows: Sequence[Row]) -> str:
    """All tables of a report, without those of parts that have no rows."""
    parts = [
        _environment(_of(rows, "environment")),
        *_steps(rows),
        *_places(rows),
        *_attention(_of(rows, "attention")),
        *_tests(_of(rows, "tests")),
        *_demo(_of(rows, "demo")),
        "### Parts of this report\n\n" + _table(
            ("part", "state", "s", "reason"),
            ((s["part"], s["state"], s["seconds"], s["reason"] or "") for s in states),
        ),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def merged(rows: Iterable[Row], keys: Sequence[str]) -> list[Row]:
    """Merge rows with equal values of `keys`. Later values replace earlier ones."""
    whole: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        whole.setdefault(tuple(row.get(key) for key in keys), {}).update(row)
    return list(whole.values())


def _of(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Build a Markdown table; None becomes an empty cell."""
    texts = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for line in lines:
        cells = ("" if cell is None else str(cell).replace("|", "\\|") for cell in line)
        texts.append(f"| {' | '.join(cells)} |")
    return "\n".join(texts)


def _number(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def _environment(rows: Sequence[Row]) -> str:
    """Paragraph that describes the machine and its peaks."""
    texts = []
    for row in merged((row for row in rows if row.get("what") == "environment"), ("what",)):
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        facts = ("gpu", "gpu_gib", "compute_capability", "driver", "cuda", "cpu", "cores")
        machine = ", ".join(f"{name} {row[name]}" for name in facts if row.get(name))
        texts.append(f"{machine}; Python {row['python']}, {versions}; commit {row['commit']}.")
    peaks = [(row["kind"], _number(row["tflops"], 1)) for row in rows if row.get("what") == "peak"]
    if peaks:
        texts.append(_table(("matrix product", "TFLOP/s"), peaks))
    return "\n\n".join(texts)


def _steps(rows: Sequence[Row]) -> list[str]:
    """Tables of times and of calls, for each precision and micro-batch of the step."""
    peaks = {row["kind"]: row["tflops"] for row in rows if row.get("what") == "peak"}
    measured = [row for row in rows if row["part"].startswith("step ")]
    texts = []
    for part in dict.fromkeys(row["part"] for row in measured):
        contenders = merged(_of(measured, part), ("contender",))
        first = contenders[0]
        title = f"{first['precision']}, micro-batch {first['batch_size']}"
        texts.append(f"### The step: {title}\n\n" + _times(contenders, peaks, first["precision"]))
        if any("launches" in row for row in contenders):
            texts.append(_calls(contenders))
    return texts


def _times(contenders: Sequence[Row], peaks: dict[str, float], precision: str) -> str:
    heads = (
        "contender", "s a step", "pairs/s", "kernels, s", "device busy, s", "host, s", "MFU",
        "GiB allocated", "GiB reserved", "first steps, s", "remark",
    )  # fmt: skip
    peak = peaks.get(_PEAK_OF[precision])
    lines = []
    for row in contenders:
        mfu = None
        if peak and row.get("flops") and row.get("seconds"):
            mfu = f"{row['flops'] / row['seconds'] / peak / 1e12:.1%}"
        remark = row.get("refused") or row.get("error") or row.get("profile_skipped")
        lines.append(
            (
                row["contender"], _number(row.get("seconds"), 4),
                _number(row.get("pairs_per_s"), 0), _number(row.get("kernel_s"), 4),
                _number(row.get("busy_s"), 4), _number(row.get("host_s"), 4), mfu,
                _number(row.get("peak_allocated_gib"), 1), _number(row.get("peak_reserved_gib"), 1),
                row.get("first_steps_s"), remark,
            )
        )  # fmt: skip
    return _table(heads, lines)


def _calls(contenders: Sequence[Row]) -> str:
    heads = ("contender", "waits", "by call", "launches", "graph launches", "kernels", "copies")
    lines = []
    for row in contenders:
        if "launches" in row:
            waits = row["waits"]
            by_call = ", ".join(f"{name} {count}" for name, count in waits.items())
            counts = (row["launches"], row["graph_launches"], row["kernels"], row["copies"])
            lines.append((row["contender"], sum(waits.values()), by_call, *counts))
    return _table(heads, lines)


def _places(rows: Sequence[Row]) -> list[str]:
    """Table of places where our step waits for the device, from the first part that has them."""
    for row in rows:
        if row.get("waiting_places") and row["contender"] != "published":
            title = f"### Where the host waits: {row['contender']}, micro-batch {row['batch_size']}"
            return [f"{title}\n\n" + _table(("place", "waits"), row["waiting_places"].items())]
    return []


def _attention(rows: Sequence[Row]) -> list[str]:
    """Table for each batch size, with one row per kernel and one column per case."""
    texts = []
    for batch in dict.fromkeys(row["batch_size"] for row in rows):
        ours = [row for row in rows if row["batch_size"] == batch]
        columns = list(dict.fromkeys((row["case"], row["dropout"]) for row in ours))
        heads = ["kernel", "largest error"]
        heads += [f"{case}, dropout {p}" if p else case for case, p in columns]
        heads.append("remark")
        lines = []
        for kernel in dict.fromkeys(row["kernel"] for row in ours):
            measured = {(r["case"], r["dropout"]): r for r in ours if r["kernel"] == kernel}
            errors = [row["max_error"] for row in measured.values() if "max_error" in row]
            cells = [_number(measured.get(column, {}).get("ms")) for column in columns]
            problems = dict.fromkeys(row["error"] for row in measured.values() if "error" in row)
            remark = "; ".join(problem[:100] for problem in problems)
            lines.append((kernel, f"{max(errors):.4f}" if errors else None, *cells, remark))
        title = f"### Attention, forward and backward in ms, bf16, {batch} pairs"
        texts.append(f"{title}\n\n{_table(heads, lines)}")
    return texts


def _tests(rows: Sequence[Row]) -> list[str]:
    counts = [row for row in rows if row.get("what") == "tests"]
    if not counts:
        return []
    names = ("passed", "failed", "skipped")
    texts = [_table(names, ([row[name] for name in names] for row in counts))]
    tests = [row for row in rows if row.get("what") == "test"]
    failed = [(row["test"], row["message"]) for row in tests if row["outcome"] == "failed"]
    if failed:
        texts.append(_table(("failed test", "message"), failed))
    reasons = Counter(row["message"] for row in tests if row["outcome"] == "skipped")
    if reasons:
        texts.append(_table(("skipped because", "tests"), reasons.items()))
    return ["### Tests marked gpu\n\n" + "\n\n".join(texts)]


def _demo(rows: Sequence[Row]) -> list[str]:
    texts = []
    for row in rows:
        figures = [("steps", row["steps"]), ("seconds of training", row["seconds"])]
        figures.append(("seconds of the command", row["command_seconds"]))
        for name, value in row["losses_first"].items():
            last = row["losses_last"].get(name)
            figures += [(f"{name}, first", _number(value)), (f"{name}, last", _number(last))]
        for name, value in row["evaluation"].items():
            if name.endswith(("_r1", "_r10", "candidates", "cider")):
                figures.append((name, _number(value, 2)))
        texts.append("### The demo to its end\n\n" + _table(("figure", "value"), figures))
    return texts
