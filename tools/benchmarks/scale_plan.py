"""Simulate the load on buckets, caches and processes at sizes that were never run.

    python tools/benchmarks/scale_plan.py
    python tools/benchmarks/scale_plan.py --pairs 5e9 --gpus 1024 --rate 1000

The order is computed for the whole set by the loader's `SampleOrder`. The shards that some nodes
read from some blocks are counted. Times per shard and sample were measured by `tools/benchmark.py
scale`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from blip_scale.data.loading.order import SampleOrder, StreamShape
from blip_scale.storage.objects import CHUNK_BYTES

GPUS_PER_NODE = 8
WORKERS = 8
"""Loader workers per rank."""
MICRO_BATCH = 64
SAMPLE_BYTES = 30_000
SHARD_BYTES = 64_000_000
BLOCK = 262_144
"""Samples of a shuffle block, as in the recipes."""
PARAMETERS = 361e6
"""Parameters of BLIP base with its decoder."""
CHECKPOINT_BYTES = 16
"""Bytes per parameter in a checkpoint: master weight, two moments, momentum average."""
INDEX_BYTES = 500
"""Bytes per shard in index.json."""
TABLE_BYTES = 75
"""Bytes per shard in the cached table."""
PARSE_US, OPEN_US, EPOCH_US, LAYOUT_NS = 40.0, 3.0, 0.4, 8.0
"""Microseconds per shard to parse it, to open it later, and to order an epoch; nanoseconds per
sample to compute the layout of a block."""


@dataclass(frozen=True)
class Case:
    """A run."""

    pairs: int
    gpus: int
    rate: float
    """Pairs per second of one GPU."""

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.gpus // GPUS_PER_NODE

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.pairs * SAMPLE_BYTES // SHARD_BYTES)


def shards_of_a_node(case: Case) -> tuple[float, float]:
    """Number of shards of a block that one node reads, and of all its shards.

    Both are medians over three blocks and nodes.
    """
    sizes = np.full(case.shards, SHARD_BYTES // SAMPLE_BYTES)
    order = SampleOrder([StreamShape("laion", sizes, int(sizes.sum()))], 0, BLOCK)
    micro_samples = case.gpus * MICRO_BATCH
    per_node = GPUS_PER_NODE * MICRO_BATCH
    node_shards, block_shards = [], []
    for block in range(3):
        _, start = order.block_of(0, block * 7 * BLOCK + BLOCK // 2)
        node = case.nodes * block // 3
        shards = set()
        for step in range(BLOCK // micro_samples):
            begin = start + step * micro_samples + node * per_node
            shards |= {order.locate(0, place).shard for place in range(begin, begin + per_node)}
        node_shards.append(len(shards))
        block_shards.append(len(next(order.upcoming(0, start, by_use=False))))
    return statistics.median(node_shards), statistics.median(block_shards)


def table(case: Case) -> list[tuple[str, str]]:
    """Tuples (quantity, value)."""
    node_shards, block_shards = shards_of_a_node(case)
    block_s = BLOCK / (case.gpus * case.rate)
    node_bytes_s = node_shards * SHARD_BYTES / block_s
    # One request for the size, then one per part of the content.
    requests = node_shards * (1 + -(-SHARD_BYTES // CHUNK_BYTES)) / block_s * case.nodes
    shared_requests = requests / case.nodes * block_shards / node_shards
    pairs_s = case.gpus * case.rate
    readers = case.gpus * WORKERS
    return [
        ("pairs read per second", f"{pairs_s:,.0f}"),
        ("an epoch", f"{case.pairs / pairs_s / 3600:.1f} h"),
        ("shards of 64 MB", f"{case.shards:,}"),
        ("index.json", f"{case.shards * INDEX_BYTES / 1e9:.2f} GB"),
        ("cached table, in memory of each rank", f"{case.shards * TABLE_BYTES / 1e6:.0f} MB"),
        ("opening, first time", f"{case.shards * PARSE_US / 1e6:.0f} s"),
        ("opening, later", f"{case.shards * OPEN_US / 1e6:.1f} s"),
        ("computing the order of an epoch", f"{case.shards * EPOCH_US / 1e6:.1f} s"),
        ("order in memory of each worker", f"{case.shards * 10 / 1e6:.0f} MB"),
        ("computing block layouts, per sample of a worker", f"{readers * LAYOUT_NS / 1e3:.0f} us"),
        ("a block of 262,144 samples is read in", f"{block_s:.2f} s"),
        ("shards of a block that a node reads", f"{node_shards:.0f} of {block_shards:.0f}"),
        ("one cache per node: fetched by each node", f"{node_bytes_s / 1e9:.1f} GB/s"),
        ("... sent by the bucket", f"{node_bytes_s * case.nodes / 1e9:,.0f} GB/s"),
        ("... requests to the bucket per second", f"{requests:,.0f}"),
        ("... time to replace a cache of 4 TB", f"{4e12 / node_bytes_s / 60:.0f} min"),
        ("one cache for all nodes: sent by the bucket", f"{pairs_s * SAMPLE_BYTES / 1e9:.1f} GB/s"),
        ("... requests to the bucket per second", f"{shared_requests:,.0f}"),
        ("... reads of 30 kB from the cache per second", f"{pairs_s:,.0f}"),
        ("size of a checkpoint", f"{PARAMETERS * CHECKPOINT_BYTES / 1e9:.1f} GB"),
        ("... per rank", f"{PARAMETERS * CHECKPOINT_BYTES / case.gpus / 1e6:.1f} MB"),
        ("... files, and requests to write it", f"{case.gpus + 2:,}"),
    ]


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--pairs", type=float, action="append")
    parser.add_argument("--gpus", type=int, action="append")
    parser.add_argument("--rate", type=float, default=300.0, help="pairs/s of a GPU (default: 300)")
    options = parser.parse_args()
    sizes = zip(options.pairs or (4e8, 5e9), options.gpus or (256, 1024), strict=True)
    cases = [Case(int(pairs), gpus, options.rate) for pairs, gpus in sizes]
    heads = "".join(f"{case.pairs / 1e9:g}e9 on {case.gpus}".rjust(18) for case in cases)
    print(f"{'':48}{heads}")
    for rows in zip(*map(table, cases), strict=True):
        print(f"{rows[0][0]:48}" + "".join(f"{value:>18}" for _, value in rows))


if __name__ == "__main__":
    main()
