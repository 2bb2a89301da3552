"""metrics.csv in the run folder: one row per logged point, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from blip_scale.engine.watching.loggers.logger import LoggedRun
from blip_scale.engine.watching.pictures import Panel
from blip_scale.storage import files, run_folder


class CsvLogger:
    """Appends a row to metrics.csv at each logged point.

    The first column is `step`. A metric that appears later, such as a held-out result, becomes a
    new last column. The file is then rewritten with empty cells in the earlier rows, so columns
    never move and each row has all columns.
    """

    def __init__(self, run: LoggedRun) -> None:
        """Keep the complete rows up to the step from which the run resumes.

        Raises:
            OSError: the file can't be read or written.
        """
        self._file = run.output_dir / run_folder.METRICS_CSV
        self._columns = ["step"]
        self._keep_until(run.start_step)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row. Add a column first for each new metric."""
        new = [name for name in metrics if name not in self._columns]
        if new or not self._file.exists():
            widened = [*self._columns, *new]
            rows = [row for row in _read(self._file) if row and row[0] != "step"]
            empty = [""] * len(new)
            self._write(widened, [row + empty for row in rows])
            self._columns = widened
        row = {"step": step, **metrics}
        with self._file.open("a", encoding="utf-8", newline="") as stream:
            stream.write(_line([str(row.get(name, "")) for name in self._columns]))

    def pictures(self, step: int, name: str, sheet: Tensor, panels: Sequence[Panel]) -> None:
        """A table has no pictures."""

    def text(self, step: int, name: str, text: str) -> None:
        """recipe.yaml is in the run folder already."""

    def close(self, finished: bool) -> None:
        """The file is closed after every row."""

    def _keep_until(self, last_step: int) -> None:
        """Remove rows after `last_step`, and incomplete rows that a kill left."""
        lines = _read(self._file)
        if not lines or lines[0][:1] != ["step"]:
            self._file.unlink(missing_ok=True)
            return
        self._columns = lines[0]
        kept = []
        for row in lines[1:]:
            is_whole = len(row) == len(self._columns) and row[0].isdecimal()
            if is_whole and int(row[0]) <= last_step:
                kept.append(row)
        if len(kept) < len(lines) - 1 or not _ends_a_line(self._file):
            self._write(self._columns, kept)

    def _write(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        files.write_whole(self._file, "".join(map(_line, [columns, *rows])))


def _read(file: Path) -> list[list[str]]:
    """Return the rows of a CSV file with the header, or an empty list without a file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        return list(csv.reader(stream))


def _line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
