"""Compare reading samples from tars and from MDS shards: `python tools/benchmarks/tars.py`.

Tars of synthetic images are indexed and converted. Then all samples are read in random order from
both in turns, without decoding. Times are medians of CPU time, which a busy machine affects less.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from blip_scale.config.recipe import StreamRecipe  # noqa: E402
from blip_scale.data.conversion.pairs import Source  # noqa: E402
from blip_scale.data.conversion.run import Conversion, Part, convert  # noqa: E402
from blip_scale.data.conversion.screening import Rules  # noqa: E402
from blip_scale.data.conversion.tar_index import IndexJob, write_index  # noqa: E402
from blip_scale.data.mds import OFFSET_LIMIT  # noqa: E402
from blip_scale.data.reading.stream_store import StreamStore  # noqa: E402
from blip_scale.data.reading.streams import open_stream  # noqa: E402
from blip_scale.data.sources.webdataset import chunks  # noqa: E402


def write_tars(folder: Path, count: int, samples: int) -> None:
    """Write tars of noise JPEGs of about 30 kB, with captions and metadata like img2dataset."""
    noise = np.random.default_rng(0).integers(0, 256, (224, 288, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).save(encoded, "JPEG", quality=45)
    for number in range(count):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for index in range(samples):
                key = f"{number:05}{index:04}"
                meta = f'{{"url": "http://a.example/{key}.jpg", "similarity": 0.3}}'
                for ending, data in (
                    ("jpg", encoded.getvalue()), ("json", meta.encode()),
                    ("txt", f"a photo of thing {index} in the street".encode()),
                ):  # fmt: skip
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def read_us(store: StreamStore, places: list[tuple[int, int]]) -> float:
    """CPU time per sample in microseconds."""
    start_s = time.process_time()
    for shard, sample in places:
        store.read(shard, sample)
    return (time.process_time() - start_s) / len(places) * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tars", type=int, default=8)
    parser.add_argument("--samples", type=int, default=500, help="of a tar")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        tars, shards = Path(scratch) / "tars", Path(scratch) / "shards"
        tars.mkdir()
        write_tars(tars, options.tars, options.samples)
        bytes_of_tars = sum(path.stat().st_size for path in tars.iterdir())
        seconds = {}
        start_s = time.perf_counter()
        job = Conversion(list(chunks(Source(str(tars)))), str(shards), Rules("a"), OFFSET_LIMIT - 1)
        convert(job, Part())
        seconds["MDS shards"] = time.perf_counter() - start_s
        start_s = time.perf_counter()
        write_index(IndexJob(str(tars), f"{tars}/tar-index"), start_method="fork")
        seconds["tars"] = time.perf_counter() - start_s
        stores = {
            "MDS shards": open_stream(StreamRecipe("a", str(shards))),
            "tars": open_stream(StreamRecipe("a", str(tars), format="tars")),
        }
        places = stores["tars"].places(range(stores["tars"].samples))
        random.Random(0).shuffle(places)
        figures: dict[str, list[float]] = {name: [] for name in stores}
        for _ in range(options.rounds):
            for name, store in stores.items():
                figures[name].append(read_us(store, places))
        pairs = len(places)
        for name, values in figures.items():
            print(
                f"{name}: {statistics.median(values):.0f} us a sample (from {min(values):.0f}), "
                f"made with {pairs / seconds[name]:.0f} pairs/s in one process"
            )
        index = sum(
            path.stat().st_size for path in (tars / "tar-index").rglob("*") if path.is_file()
        )
        print(f"{pairs} samples; the index has {index / bytes_of_tars:.1%} of the tars' bytes")


if __name__ == "__main__":
    main()
