"""`tools/benchmark.py scale`: cost of a sample, an opening and an epoch, by number of shards.

Each number of shards is measured in its own process. The shards are hard links to a few real files
with small samples. Times are CPU times, which a busy machine affects less, and medians over rounds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 1_000
"""Samples per shard."""
IMAGE_BYTES = 2_000
FILES = 8
"""Minimum number of real files. With fewer, all reads would hit the processor's caches."""
LINKS = 50_000
"""Maximum hard links per file; ext4 allows 65,000."""
BLOCK = 262_144
"""Samples of a shuffle block, as in the recipes."""
WORKERS = 8
"""Loader workers per rank. One of them computes a block's layout for all."""
READERS = 256 * WORKERS
"""Ranks times workers. Each reads its share of every block."""
ROWS = (
    ("us a sample, one reader", "sample_us"),
    (f"us a sample, one of {READERS:,} readers", "reader_us"),
    ("  of it reading", "share_us"),
    ("  of it computing block layouts", "layout_us"),
    ("  of it planning what to fetch", "plan_us"),
    ("s to open, first time", "first_open_s"),
    ("s to open, later", "open_s"),
    ("s to compute the order of an epoch", "epoch_s"),
    ("additional MB in a rank without loader workers", "rank_mb"),
    ("  of it private", "rank_private_mb"),
    ("additional MB in a loader worker", "worker_mb"),
    ("  of it private", "worker_private_mb"),
    ("MB at the peak of the first opening", "peak_mb"),
    ("kB sent to a loader worker", "sent_kb"),
    ("bytes of inventory", "inventory_bytes"),
)
"""Tuples (label in the printed table, key of its figure)."""


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the figures for each number of shards."""
    figures: dict[int, dict[str, float]] = {}
    for count in options.shards:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.scratch) as scratch:
            folder = Path(scratch) / "laion"
            make_set(folder, count)
            figures[count] = {}
            for part in ("first", "later"):
                command = [sys.executable, __file__, part, str(folder), str(options.rounds)]
                process = subprocess.run(
                    command, env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                figures[count] |= json.loads(process.stdout)
    result: dict[str, Any] = {"rounds": options.rounds, "shards": figures}
    if options.records:
        from tools.benchmarks.scale_merge import merge_figures

        result["merge"] = merge_figures(options.records, options.scratch)
    if options.lines:
        from tools.benchmarks.scale_lists import list_figures

        result["lists"] = list_figures(options.lines, options.scratch)
    if options.overlays:
        from tools.benchmarks.scale_overlays import overlay_figures

        result["overlays"] = overlay_figures(options.overlays, options.scratch)
    return result


def make_set(folder: Path, count: int) -> None:
    """Make a set of `count` shards: links to a few files, and an index that lists all."""
    from blip_scale.data.shards import Record, write_shards

    files = []
    for number in range(max(FILES, -(-count // LINKS))):
        records = (
            Record(f"{number}/{i}", bytes(IMAGE_BYTES), f"a photo of thing {i}", "laion", 640, 480)
            for i in range(SAMPLES)
        )
        part = folder.with_name(f"part{number}")
        write_shards(part, records, "64mb")
        (entry,) = json.loads((part / "index.json").read_text())["shards"]
        files.append((part / entry["raw_data"]["basename"], entry))
    folder.mkdir()
    shards = []
    for number in range(count):
        path, entry = files[number % len(files)]
        name = f"shard.{number:06}.mds"
        os.link(path, folder / name)
        shards.append(entry | {"raw_data": entry["raw_data"] | {"basename": name}})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    remote = folder.with_name("remote")  # the folder is a complete cache of this remote
    remote.mkdir()
    os.link(folder / "index.json", remote / "index.json")


def memory_mb() -> dict[str, float]:
    """Memory of this process that is not backed by files, and the private part of it, in MB."""
    from tools.benchmarks.scripts_at_scale import status_kb

    gc.collect()
    private = status_kb("RssAnon") / 1024
    return {"mb": private + status_kb("RssShmem") / 1024, "private_mb": private}


def memory_since(before: dict[str, float], process: str) -> dict[str, float]:
    """Additional memory since `before`, by key of the figure."""
    now = memory_mb()
    return {f"{process}_{name}": now[name] - before[name] for name in now}


def seconds_of(action: Callable[[], object]) -> float:
    """CPU time of this process."""
    start = time.process_time()
    action()
    return time.process_time() - start


def measure_first(folder: Path, rounds: int) -> dict[str, float]:
    """The first opening."""
    from blip_scale.config.recipe import StreamRecipe
    from blip_scale.data.reading.stream_store import StreamStore
    from tools.benchmarks.scripts_at_scale import status_kb

    before = memory_mb()
    seconds = seconds_of(lambda: StreamStore(StreamRecipe("laion", str(folder))))
    return {"first_open_s": seconds, "peak_mb": status_kb("VmHWM") / 1024 - before["mb"]}


def measure_later(folder: Path, rounds: int) -> dict[str, float]:
    """Measure later openings, and reading."""
    from blip_scale.config.recipe import StreamRecipe
    from blip_scale.data.loading.loader import SampleOrder
    from blip_scale.data.loading.order import StreamShape
    from blip_scale.data.reading.inventory import inventory
    from blip_scale.data.reading.prefetch import Prefetcher
    from blip_scale.data.reading.stream_store import StreamStore

    open_s = seconds_of(lambda: StreamStore(StreamRecipe("laion", str(folder))))
    before = memory_mb()
    store = StreamStore(StreamRecipe("laion", str(folder), str(folder.with_name("remote"))))
    epoch_samples = store.samples
    order = SampleOrder([StreamShape("laion", store.shared_items, epoch_samples)], 0, BLOCK)
    sent = pickle.dumps((store, order))
    of_worker = _in_worker((store, order))
    epoch_s = seconds_of(lambda: order.block_of(0, 0))
    parts = ("made", "taken", "plan", "replan", "share", "sample")
    times: dict[str, list[float]] = {part: [] for part in parts}
    other = copy.copy(order)
    share = BLOCK // READERS
    prefetcher = Prefetcher([store], order)
    for number in range(rounds):
        begin = number * 7 % max(1, epoch_samples // BLOCK - 2) * BLOCK + BLOCK // 2
        for each in (order, other):
            each.block_of(number, begin)
        prefetcher._plan(number, begin)  # it plans one block after another
        begin = (begin + BLOCK) % (epoch_samples - share - 4 * SAMPLES)
        times["made"].append(seconds_of(partial(order.locate, number, begin)))
        times["taken"].append(seconds_of(partial(other.locate, number, begin)))
        for part in ("plan", "replan"):
            times[part].append(seconds_of(partial(prefetcher._plan, number, begin)))
        places = range(begin, begin + share)
        times["share"].append(seconds_of(partial(read, store, order, number, places)) / share)
        places = range(begin + share, begin + share + 4 * SAMPLES)
        read(store, order, number, places[: 2 * SAMPLES])
        seconds = seconds_of(partial(read, store, order, number, places[2 * SAMPLES :]))
        times["sample"].append(seconds / (2 * SAMPLES))
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    reader = {
        "share_us": median["share"] * 1e6,
        "layout_us": _of_workers(median["made"], median["taken"]) / share * 1e6,
        "plan_us": _of_workers(median["plan"], median["replan"]) / share * 1e6,
    }
    return {
        "sample_us": (median["sample"] + median["made"] / BLOCK) * 1e6,
        "reader_us": sum(reader.values()),
        **reader,
        "open_s": open_s,
        "epoch_s": epoch_s,
        **memory_since(before, "rank"),
        **of_worker,
        "sent_kb": len(sent) / 1e3,
        "inventory_bytes": len(json.dumps(inventory([store]))),
    }


def _of_workers(first_s: float, others_s: float) -> float:
    """Mean over the workers of a rank. The first one does some work for all."""
    return (first_s + (WORKERS - 1) * others_s) / WORKERS


def read(store: Any, order: Any, epoch: int, places: Iterable[int]) -> None:
    """Do everything that a loader worker does for each sample, except decoding its image."""
    import torch

    from blip_scale.data.loading.micro_batches import read_or_replace

    pixels, skipped = torch.empty(0), list[str]()
    for place in places:
        slot = order.locate(epoch, place)
        sample, _ = store.locate(slot.shard, slot.sample)
        read_or_replace(store, slot._replace(sample=sample), lambda sample: pixels, skipped)
    if skipped:
        raise RuntimeError(skipped[0])


def _in_worker(sent: tuple[Any, Any]) -> dict[str, float]:
    """MB that a process needs to receive and use a store and an order, and to plan prefetching."""
    context = multiprocessing.get_context("spawn")
    ours, workers_end = context.Pipe()
    process = context.Process(target=_work, args=(workers_end,))
    process.start()
    ours.recv()  # it has finished its imports
    ours.send(sent)
    held: dict[str, float] = ours.recv()
    process.join()
    return held


def _work(pipe: Any) -> None:
    from blip_scale.data.loading import loader
    from blip_scale.data.reading.prefetch import Prefetcher

    pipe.send(loader.__name__)
    before = memory_mb()
    store, order = pipe.recv()
    read(store, order, 0, range(SAMPLES))
    prefetcher = Prefetcher([store], order)
    prefetcher._plan(0, 0)
    pipe.send(memory_since(before, "worker"))


def scale_table(result: dict[str, Any]) -> str:
    """The result as text."""
    columns = result["shards"]
    lines = [f"{'shards':48}" + "".join(f"{int(count):>12,}" for count in columns)]
    for title, figure in ROWS:
        cells = "".join(f"{column[figure]:12.4g}" for column in columns.values())
        lines.append(f"{title:48}{cells}")
    lines.append(f"CPU time of a core; medians of {result['rounds']}; {SAMPLES} samples a shard")
    if "merge" in result:
        lines.append(f"{'records to merge':>16}{'s':>10}{'MB':>10}")
        for part, note in (("records", ""), ("extrapolated", "  (extrapolated)")):
            for count, figures in result["merge"][part].items():
                seconds, megabytes = figures["merge_s"], figures["merge_mb"]
                lines.append(f"{int(count):16,}{seconds:10.1f}{megabytes:10.0f}{note}")
    if "lists" in result:
        lines.append(f"{'lines of a list':>16}{'s to scan':>10}{'s to plan':>10}{'MB':>10}")
        for form, columns in result["lists"].items():
            for count, figures in columns.items():
                cells = "".join(
                    f"{figures[name]:10.1f}" for name in ("list_s", "plan_s", "list_mb")
                )
                lines.append(f"{int(count):16,}{cells}  {form}")
        lines.append("the last line of each form is extrapolated")
    if "overlays" in result:
        names = {"s": "make_s", "MB": "make_mb", "s to open": "open_s", "MB open": "open_mb"}
        names |= {"us a sample": "read_us"}
        lines.append(f"{'overlay, records':>16}" + "".join(f"{name:>12}" for name in names))
        for part, note in (("records", ""), ("extrapolated", "  (extrapolated)")):
            for count, figures in result["overlays"][part].items():
                cells = "".join(f"{figures[name]:12.1f}" for name in names.values())
                lines.append(f"{int(count):16,}{cells}{note}")
    return "\n".join(lines)


def add_scale(commands: Any) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "scale",
        help="cost of a sample, an opening and an epoch with 1,000 to 400,000 shards",
        description="Measure CPU time and memory of the read path with shards that are hard links "
        "to a few real files: finding and reading a sample (without decoding its image), opening a "
        "stream for the first time and later, computing the order of an epoch, and the data sent "
        f"to a loader worker. One of {READERS:,} readers is a worker of a run on 256 GPUs with 8 "
        "workers each. It takes about three minutes, and 2 GB of temporary files.",
    )
    command.add_argument(
        "--shards", type=int, nargs="+", default=[1_000, 40_000, 400_000], metavar="N",
        help="default: 1000 40000 400000",
    )  # fmt: skip
    command.add_argument("--rounds", type=int, default=9, help="blocks to read from (default: 9)")
    command.add_argument(
        "--records", type=int, nargs="+", metavar="N",
        help="also merge conversions of this many records, and extrapolate to 100 million",
    )  # fmt: skip
    command.add_argument(
        "--lines", type=int, nargs="+", metavar="N",
        help="also scan lists of this many lines, plan their conversion, and extrapolate",
    )  # fmt: skip
    command.add_argument(
        "--overlays", type=int, nargs="+", metavar="N",
        help="also make, open and read an overlay of this many records, and extrapolate",
    )  # fmt: skip
    command.add_argument("--scratch", type=Path, help="folder for temporary files (default: /tmp)")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(measure=scale, show=scale_table)


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    measures = {"first": measure_first, "later": measure_later}
    print(json.dumps(measures[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
