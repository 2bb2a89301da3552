"""Update the tables of docs/scaling.md: `python tools/benchmarks/scaling_tables.py`.

Each row whose first cell is a command is replaced by its result from `blip-scale plan`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from blip_scale.commands import plan  # noqa: E402
from blip_scale.planning.assumptions import duration  # noqa: E402

DOCS = REPO / "docs" / "scaling.md"
ROW = re.compile(r"\| `((?:base|large)_\w+ [^`]*)` \|")
"""Pattern of a table row. Its group holds the arguments of the command."""


def row(arguments: str) -> str:
    """Build the row of one plan.

    Raises:
        ValueError: the plan is refused.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = plan.main([*arguments.split(), "--json"])
    if code:
        raise ValueError(f"{DOCS}: `{arguments}` is refused")
    figures = json.loads(out.getvalue())
    batch, ways, steps = figures["batch"], figures["ways"], figures["steps"]
    planned = ways[figures["way"]]
    cells = [
        f"`{arguments}`",
        f"{batch['world_size']} x {batch['micro_batch']} x {batch['accumulation']}",
        f"{figures['memory_per_gpu_gib']:.1f}",
        _milliseconds(planned),
        _milliseconds(ways["partitioned"]) if "partitioned" in ways else "",
        _milliseconds(ways["graph"]),
        planned["limit"],
        _time(planned, steps),
        _time(ways["graph"], steps),
    ]
    return f"| {' | '.join(cells)} |"


def rewritten(text: str) -> str:
    """Return the page with all rows of commands updated."""
    lines = []
    for line in text.splitlines():
        match = ROW.match(line)
        lines.append(row(match[1]) if match else line)
    return "\n".join(lines) + "\n"


def _milliseconds(way: dict[str, Any]) -> str:
    fast, slow = way["step_seconds_range"]
    return f"{fast * 1e3:.0f} to {slow * 1e3:.0f}"


def _time(way: dict[str, Any], steps: int) -> str:
    fast, slow = way["step_seconds_range"]
    return f"{duration(steps * fast)} to {duration(steps * slow)}"


def main() -> None:
    """Rewrite the page."""
    DOCS.write_text(rewritten(DOCS.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
