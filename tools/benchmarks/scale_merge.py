"""Time and memory to merge a conversion, by number of records, for `tools/benchmark.py scale`.

As a script, it merges a folder of synthetic chunk reports, and prints time and memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 10_000
"""Records per chunk: a tar of img2dataset, or `--pairs-per-chunk`."""
SHARDS = 5
"""Shards per chunk: 64 MB each, at 32 kB per record."""


def merge_figures(records: list[int], scratch: Path | None) -> dict[str, Any]:
    """CPU seconds and peak memory of merges, and extrapolated to 100 million records."""
    from tools.benchmarks.scripts_at_scale import TARGET, extrapolated, figures_of

    figures: dict[int, dict[str, float]] = {}
    for count in records:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch) as folder:
            make_reports(Path(folder), count)
            figures[count] = figures_of(__file__, Path(folder))
    return {"records": figures, "extrapolated": {TARGET: extrapolated(figures)}}


def make_reports(folder: Path, records: int) -> None:
    """Write reports of chunks without shards. A merge without duplicates reads no shards."""
    from blip_scale.data.conversion.report import Counts, Report, report_name

    settings = {"version": 2, "format": "mds", "compression": None, "zip_data": None}
    (folder / "chunks").mkdir()
    for number in range(records // CHUNK):
        shards = []
        for part in range(SHARDS):
            raw = {
                "basename": f"shard.{number:06}.{part:05}.mds",
                "bytes": 64_000_000,
                "hashes": {"xxh64": f"{number:016x}"},
            }
            shards.append(settings | {"samples": CHUNK // SHARDS, "raw_data": raw})
        ids = [f"{number * CHUNK + i:012}" for i in range(CHUNK)]
        counts = Counts(CHUNK, CHUNK, 0)
        report = Report(
            number, f"{number:05}.tar", shards, [None] * SHARDS,
            ids=ids, pairs=counts, captions=counts,
        )  # fmt: skip
        (folder / report_name(number)).write_text(report.to_json())


def merge(folder: Path) -> dict[str, float]:
    """Measure a merge in this process."""
    from blip_scale.data.conversion.merge import merge_chunks
    from blip_scale.data.conversion.output import OutputFolder
    from tools.benchmarks.scripts_at_scale import status_kb

    chunks = len(list((folder / "chunks").iterdir()))
    out = OutputFolder(str(folder))
    before_mb, start = status_kb("VmHWM") / 1024, time.process_time()
    merge_chunks(out, {"chunks": chunks, "shard_bytes": 64_000_000, "rules": {}})
    return {
        "merge_s": time.process_time() - start,
        "merge_mb": status_kb("VmHWM") / 1024 - before_mb,
    }


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    print(json.dumps(merge(Path(sys.argv[1]))))
