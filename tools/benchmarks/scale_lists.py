"""Time and memory to plan the conversion of a list, for `benchmark.py scale`.

As a script, it lists the chunks of a file, plans their conversion, and prints time and memory.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FORMS = {"jsonl": "folder", "csv": "folder", "json": "blip_json", "jsonl.gz": "folder"}
"""File extension of a list -> its reader."""


def list_figures(lines: list[int], scratch: Path | None) -> dict[str, Any]:
    """CPU seconds and peak memory by format and lines, and extrapolated to 100 million lines."""
    from tools.benchmarks.scripts_at_scale import TARGET, extrapolated, figures_of

    figures: dict[str, dict[int, dict[str, float]]] = {}
    for form in FORMS:
        figures[form] = {}
        for count in lines:
            with tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch) as folder:
                path = Path(folder) / f"list.{form}"
                make_list(path, count)
                figures[form][count] = figures_of(__file__, path)
        figures[form][TARGET] = extrapolated(figures[form])
    return figures


def make_list(path: Path, lines: int) -> None:
    """Write a list of images that do not exist, each with one caption of ten words."""
    form = _form(path)
    open_text = gzip.open if form.endswith(".gz") else open
    with open_text(path, "wt", encoding="utf-8") as file:
        file.writelines(_rows(form.removesuffix(".gz"), lines))


def _form(path: Path) -> str:
    return path.name.partition(".")[2]


def _rows(form: str, lines: int) -> Iterator[str]:
    if form == "csv":
        yield "image,caption\n"
    for number in range(lines):
        image = f"{number // 10_000:05}/{number:09}.jpg"
        caption = f"a photo of thing {number} on a table by the window"
        if form == "csv":
            yield f"{image},{caption}\n"
            continue
        item = json.dumps({"image": image, "caption": caption})
        if form == "jsonl":
            yield f"{item}\n"
        else:
            yield f"{', ' if number else '['}{item}"
    if form == "json":
        yield "]"


def measure(path: Path) -> dict[str, float]:
    """List the chunks of a file and plan their conversion, in this process."""
    from blip_scale.data.conversion.pairs import Source
    from blip_scale.data.conversion.run import Conversion
    from blip_scale.data.conversion.screening import Rules
    from blip_scale.data.sources.readers import READERS
    from tools.benchmarks.scripts_at_scale import status_kb

    before_mb, start = status_kb("VmHWM") / 1024, time.process_time()
    chunks = list(READERS[FORMS[_form(path)]].chunks(Source(str(path))))
    listed = time.process_time()
    Conversion(chunks, "out", Rules("bench", images_below=str(path.parent))).plan()
    return {
        "list_s": listed - start,
        "plan_s": time.process_time() - listed,
        "list_mb": status_kb("VmHWM") / 1024 - before_mb,
    }


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    print(json.dumps(measure(Path(sys.argv[1]))))
