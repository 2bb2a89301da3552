"""Show the figures of a finished run: python tools/show_summary.py runs/demo."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip_scale import logs
from blip_scale.commands.command_line import Parser, refuse
from blip_scale.storage import files, run_folder
from blip_scale.storage.untrusted import parse_json


def main(arguments: Sequence[str] | None = None, prog: str = "show_summary.py") -> int:
    """Print summary.json as a table, and return the exit code."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("run", type=Path, help="output folder of the run")
    parser.add_argument(
        "--started", type=int, metavar="UNIX_TIME",
        help="start of the whole command; its duration is added to summary.json",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    file = options.run / run_folder.SUMMARY
    if not file.is_file():
        return refuse(prog, f"{file}: no such file; the run has not finished")
    try:
        summary = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        return refuse(prog, f"{file} cannot be read: {error}")
    if options.started is not None:
        # If the run was already finished, keep the duration of the command that ran it.
        summary.setdefault("seconds_whole_command", int(time.time()) - options.started)
        files.write_whole(file, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    captions = summary.pop("captions", [])
    rows = list(_rows(summary))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(logs.printable(f"{name:<{width}}  {value}"))
    for line in _caption_lines(captions, summary.get("evaluation", {})):
        print(logs.printable(line) if line else "")
    print(
        f"\nFigures: {file}\nPictures of the captions: make tensorboard, or tensorboard --logdir "
        f"{options.run}, under Images"
    )
    return 0


def _rows(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every figure with its dotted name. A mapping in a list becomes one row."""
    if isinstance(value, dict) and not name.rpartition(".")[2].isdigit():
        for key, inner in value.items():
            yield from _rows(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _rows(inner, f"{name}.{index}")
    elif isinstance(value, dict):
        yield name, "  |  ".join(f"{key}: {inner}" for key, inner in value.items())
    else:
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


def _caption_lines(captions: list[dict[str, Any]], figures: dict[str, Any]) -> Iterator[str]:
    """Yield a table for each held-out set, in the order of the summary.

    In the summary, captions with a higher matching probability come first.
    """
    for name in dict.fromkeys(str(entry.get("set", "")) for entry in captions):
        entries = [entry for entry in captions if str(entry.get("set", "")) == name]
        width = max(len(str(entry.get("caption", ""))) for entry in entries)
        yield ""
        yield _caption_title(name, entries, figures.get(f"{name}/exact"))
        for entry in entries:
            match, caption = entry.get("match"), str(entry.get("caption", ""))
            truth = str(entry.get("truth", ""))
            sign = "=" if caption == truth else " "
            begin = f"{match:5.2f}  " if isinstance(match, float) else ""
            yield f"{begin}{caption:<{width}}  {sign} {truth}"


def _caption_title(name: str, entries: list[dict[str, Any]], exact: float | None) -> str:
    title = f"Captions of {name}, and what was right (=: the same)"
    if any("match" in entry for entry in entries):
        title += "; in front the probability that they match, by the network itself"
    if exact is not None:
        title += f"; {exact:.1%} of all are the same"
    return title
