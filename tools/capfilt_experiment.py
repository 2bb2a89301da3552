"""CapFilt on the demo's pairs with a known share of wrong captions: does it close the loop?

python tools/capfilt_experiment.py data/demo runs/capfilt
Every step that is done is kept; the same command goes on. docs/capfilt.md tells what came out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from blip_scale.data import Record, write_shards
from blip_scale.data.stores import StreamStore
from blip_scale.recipe import StreamRecipe


def samples_of(folder: Path) -> Iterator[dict]:
    """All samples of a set of shards."""
    store = StreamStore(StreamRecipe(folder.name, str(folder)))
    for shard, count in enumerate(store.shard_samples):
        for index in range(count):
            yield store.read(shard, index)


def make_sets(demo: Path, out: Path, share: float) -> dict[str, int]:
    """`annotated`: the drawings of one hand; `web`: those of the other, `share` of them with the
    caption of another of them, and the icons. Names with `wrong/` in front tell the swapped."""
    rng = np.random.default_rng(0)
    emoji = list(samples_of(demo / "emoji"))
    mine = [sample for sample in emoji if sample["source"] == "openmoji"]
    other = [sample for sample in emoji if sample["source"] != "openmoji"]
    swapped = rng.choice(len(other), round(share * len(other)), replace=False)
    captions = {
        int(i): other[int(j)]["captions"] for i, j in zip(swapped, np.roll(swapped, 1), strict=True)
    }
    web = [
        record(sample, captions.get(i), "wrong" if i in captions else "right")
        for i, sample in enumerate(other)
    ]
    web += [record(sample, None, "icons") for sample in samples_of(demo / "icons")]
    order = rng.permutation(len(web))
    return {
        "annotated": write_shards(out / "annotated", (record(s, None, "") for s in mine), "1mb"),
        "web": write_shards(out / "web", (web[i] for i in order), "1mb"),
    }


def record(sample: dict, captions: list[str] | None, kind: str) -> Record:
    fields = {k: sample[k] for k in ("image", "source", "width", "height")}
    name = f"{kind}/{sample['id']}" if kind else sample["id"]
    return Record(name, caption=captions or sample["captions"], **fields)


if __name__ == "__main__":
    demo, out = Path(sys.argv[1]), Path(sys.argv[2])
    print(make_sets(demo, out / "data", 0.4))
