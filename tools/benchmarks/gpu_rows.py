"""Measured rows of `gpu_report.py`, kept as JSON Lines even if the process is killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

NAME = "rows.jsonl"
"""File name in the folder of a report."""


class Rows:
    """Writer that appends rows to a report's file and flushes each at once."""

    def __init__(self, folder: Path, part: str) -> None:
        self._file, self._part = folder / NAME, part
        self._began = time.monotonic()

    def add(self, **values: Any) -> None:
        """Append a row of JSON-able values."""
        at_s = round(time.monotonic() - self._began, 1)
        line = json.dumps({"part": self._part, "at_s": at_s, **values}, default=str)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Read all complete rows; an incomplete last line is ignored."""
    file = folder / NAME
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
