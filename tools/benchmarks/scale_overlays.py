"""Time and memory to make, open and read an overlay by records, for `benchmark.py scale`.

As a script with a folder of images and captions, it makes their overlay or, if there is one, opens
and reads it, and prints time and memory.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 1_000
"""Samples per shard."""
READ_EVERY = 997
"""Distance between two samples that are read."""


def overlay_figures(records: list[int], scratch: Path | None) -> dict[str, Any]:
    """CPU seconds and memory by number of records, and extrapolated to 100 million records."""
    from tools.benchmarks.scripts_at_scale import TARGET, extrapolated, figures_of

    figures: dict[int, dict[str, float]] = {}
    for count in records:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch) as folder:
            make_inputs(Path(folder), count)
            figures[count] = figures_of(__file__, Path(folder)) | figures_of(__file__, Path(folder))
    extrapolation = extrapolated(figures)
    extrapolation["read_us"] = figures[max(figures)]["read_us"]  # constant
    return {"records": figures, "extrapolated": {TARGET: extrapolation}}


def make_inputs(folder: Path, records: int) -> None:
    """Write shards of tiny images, and a list of captions in the same order, with unsorted keys."""
    from blip_scale.data.mds import Writer
    from blip_scale.data.shards import COLUMNS, EXTRA_COLUMNS, HASH, Record

    columns = {**COLUMNS, "uid": EXTRA_COLUMNS["uid"]}
    with (
        Writer(folder / "images", columns, "64mb", hashes=(HASH,)) as writer,
        (folder / "captions.jsonl").open("w", encoding="utf-8") as lines,
    ):
        for number in range(records):
            uid = hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()
            name = f"{number:012}"
            record = Record(name, b"image", f"thing {number}", "bench", 640, 480, uid=uid)
            writer.write(record.sample())
            caption = f"a photo of thing {number} on a table by the window"
            lines.write(json.dumps({"uid": uid, "re_caption": caption}) + "\n")
            if (number + 1) % SAMPLES == 0:
                writer.end_shard()


def make(folder: Path) -> dict[str, float]:
    """Make the overlay in this process."""
    from blip_scale.data.conversion.caption_files import CaptionFiles
    from blip_scale.data.conversion.overlay import OverlayJob, make_overlay
    from tools.benchmarks.scripts_at_scale import status_kb

    files = CaptionFiles((str(folder / "captions.jsonl"),), "uid", "re_caption")
    job = OverlayJob(str(folder / "images"), files, str(folder / "overlay"))
    before_mb, start = status_kb("VmHWM") / 1024, time.process_time()
    manifest = make_overlay(job)
    if manifest["captions"]["joined"] != manifest["samples"]["all"]:
        raise RuntimeError(f"not all captions are joined: {manifest['captions']}")
    return {
        "make_s": time.process_time() - start,
        "make_mb": status_kb("VmHWM") / 1024 - before_mb,
    }


def read(folder: Path) -> dict[str, float]:
    """Open the images with the overlay for the second time, and read some samples."""
    from blip_scale.config.recipe import StreamRecipe
    from blip_scale.data.reading.stream_store import StreamStore
    from tools.benchmarks.scale import memory_mb

    images, overlay = str(folder / "images"), str(folder / "overlay")
    StreamStore(StreamRecipe("bench", images, overlays=[overlay]))
    before, start = memory_mb(), time.process_time()
    store = StreamStore(StreamRecipe("bench", images, overlays=[overlay]))
    open_s = time.process_time() - start
    after = memory_mb()
    store.read(0, 0)
    places = range(READ_EVERY, store.samples, READ_EVERY)
    start = time.process_time()
    for place in places:
        store.read(*divmod(place, SAMPLES))
    return {
        "open_s": open_s,
        "open_mb": after["mb"] - before["mb"],
        "read_us": (time.process_time() - start) / len(places) * 1e6,
    }


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    place = Path(sys.argv[1])
    print(json.dumps((read if (place / "overlay").exists() else make)(place)))
