"""Does CapFilt close the loop? The demo's pairs with a known share of wrong captions, cleaned and
trained on, against the same pairs as they were.

python tools/prepare_data.py demo data/demo
python tools/benchmarks/capfilt_experiment.py data/demo runs/capfilt
Everything that is done is kept; the same command goes on. docs/capfilt.md tells what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from blip_scale.config.recipe import StreamRecipe
from blip_scale.data.reading.stream_store import StreamStore
from blip_scale.data.shards import Record, write_shards
from blip_scale.inference.images import batched, pixels_of
from blip_scale.inference.loading import load_blip
from blip_scale.storage import run_folder

REPO = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
WRONG = 0.4
"""Share of the web drawings whose caption is another's."""
HELDOUT = ("heldout_drawing", "heldout_concept")
SMALL = (
    # A network that two CPU cores train in minutes, and whose matching head learns in some hundred
    # steps; every run has the same steps and learning rates, whatever the size of its set.
    "model.vision.image_size=48",
    "model.vision.overrides={patch_size: 12, embed_dim: 128, depth: 4, num_heads: 4}",
    "model.vision.init_std=0.08",
    "model.text={checkpoint: null, tokenizer: TEXT, layers: 2, width: 128, heads: 4, "
    "mlp_width: 512, dropout: 0.0, init_std: 0.08}",
    "model.embed_dim=64",
    "objective.alpha=0",
    "data.workers=0",
    "optimizer.peak_lr=2.0e-3",
    "optimizer.warmup_steps=15",
    "optimizer.lr_decay=0.85",
    "checkpoint.every_steps=100000",
    "evaluation.every_steps=100000",
    "evaluation.captions=0",
    "log.every_steps=20",
)
STEPS_AN_EPOCH = 50
FINE_TUNING = (
    "objective.negatives=global",
    "optimizer.lr_decay=0.95",
    "optimizer.peak_lr=1.0e-3",
    "optimizer.warmup_steps=50",
)
KEPT = (0.7, 0.5)
"""Shares of captions of drawings never trained on that a threshold lets pass: a filter that has
seen only hard negatives gives low scores, and 0.5 is then a strict threshold."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="what prepare_data.py demo made")
    parser.add_argument("out", type=Path, help="folder for sets, runs and figures.json")
    parser.add_argument("--steps", type=int, default=600, help="of each pretraining (%(default)s)")
    parser.add_argument("--tuning-steps", type=int, default=900, help="(%(default)s)")
    options = parser.parse_args(arguments)
    demo, out, steps = options.demo.resolve(), options.out.resolve(), options.steps
    sizes = make_sets(demo, out / "data")
    raw = {name: (out / "data" / name, sizes[name]) for name in ("annotated", "web")}
    train(demo, out / "raw_0", raw, steps, "seed=0")
    annotated = {"annotated": raw["annotated"]}
    tuned = (("filter", "retrieval", 1), ("captioner", "captioning", 3))  # which learns sooner
    for name, task, part in tuned:
        start = (f"task={task}", f"model.checkpoint={out / 'raw_0'}", *FINE_TUNING)
        train(demo, out / name, annotated, options.tuning_steps // part, *start)
    statistics = filtered(out)
    texts = statistics["web"]["kept"] + statistics["synthetic"]["kept"]
    clean = annotated | {"web_capfilt": (out / "data" / "web_capfilt", texts)}
    for seed in SEEDS:
        train(demo, out / f"clean_{seed}", clean, steps, f"seed={seed}")
        train(demo, out / f"raw_{seed}", raw, steps, f"seed={seed}")
    scores = selectivity(out / "filter", out / "data" / "web", demo / HELDOUT[0])
    found = noise_found(out) | scores
    figures = {"filter": found, "retrieval": retrieval(out), "statistics": statistics}
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: figures[name] for name in ("filter", "retrieval")}, indent=1))
    return 0


def make_sets(demo: Path, out: Path) -> dict[str, int]:
    """`annotated`: the drawings of one hand, as a set that people captioned. `web`: those of the
    other hand, WRONG of them with the caption of another of them, and all icons with their paths;
    ids begin with what is known: right/, wrong/, icon/. Returns the numbers of pairs."""
    rng = np.random.default_rng(0)
    emoji = list(samples_of(demo / "emoji"))
    by_hand = [[s for s in emoji if (s["source"] == "openmoji") == mine] for mine in (True, False)]
    annotated, web = by_hand
    swapped = rng.choice(len(web), round(WRONG * len(web)), replace=False)
    captions = {
        int(i): web[int(j)]["captions"] for i, j in zip(swapped, np.roll(swapped, 1), strict=True)
    }
    records = [
        _record(sample, f"{'wrong' if i in captions else 'right'}/", captions.get(i))
        for i, sample in enumerate(web)
    ]
    records += [_record(sample, "icon/") for sample in samples_of(demo / "icons")]
    mixed = [records[i] for i in rng.permutation(len(records))]
    if not (out / "annotated").exists():
        write_shards(out / "annotated", (_record(sample) for sample in annotated), "1mb")
    if not (out / "web").exists():
        write_shards(out / "web", mixed, "1mb")
    return {"annotated": len(annotated), "web": len(records)}


def samples_of(folder: Path) -> Iterator[dict[str, Any]]:
    """All samples of a set of shards."""
    store = StreamStore(StreamRecipe(folder.name, str(folder)))
    for shard, count in enumerate(store.shard_samples):
        for index in range(count):
            yield store.read(shard, index)


def _record(sample: dict[str, Any], known: str = "", captions: list[str] | None = None) -> Record:
    fields = {key: sample[key] for key in ("image", "source", "width", "height")}
    return Record(f"{known}{sample['id']}", caption=captions or sample["captions"], **fields)


def train(
    demo: Path, run: Path, sets: dict[str, tuple[Path, int]], steps: int, *settings: str
) -> None:
    """One run on sets with their numbers of texts, which are their weights; a finished one is left
    as it is."""
    if (run / run_folder.SUMMARY).is_file():
        return
    streams = [{"name": n, "local": str(p), "weight": texts} for n, (p, texts) in sets.items()]
    heldout = [{"name": name, "local": str(demo / name)} for name in HELDOUT]
    given = [
        *(one.replace("TEXT", str(demo / "text")) for one in SMALL),
        f"output_dir={run}",
        f"data.streams={json.dumps(streams)}",
        f"data.heldout={json.dumps(heldout)}",
        f"data.samples_per_epoch={STEPS_AN_EPOCH * 64}",
        f"train.max_steps={steps}",
        f"train.epochs={-(-steps // STEPS_AN_EPOCH)}",
        *settings,
    ]
    zero2 = ["--deepspeed", str(REPO / "ds_configs" / "zero2.json")]
    command = [sys.executable, str(REPO / "blip_scale" / "train.py"), "--recipe", "demo", *zero2]
    subprocess.run([*command, *given], check=True, cwd=REPO)


def filtered(out: Path) -> dict[str, Any]:
    """CapFilt of the web set; its statistics."""
    clean = out / "data" / "web_capfilt"
    command = [sys.executable, str(REPO / "tools" / "capfilt.py"), str(out / "data" / "web")]
    command += [str(clean), "--captioner", str(out / "captioner"), "--filter", str(out / "filter")]
    command += ["--min-tokens", "2", "--max-tokens", "12", "--workers", str(os.cpu_count() or 1)]
    subprocess.run(command, check=True)
    statistics: dict[str, Any] = json.loads((clean / "statistics.json").read_text())
    return statistics


def selectivity(run: Path, web: Path, annotated: Path) -> dict[str, Any]:
    """How well a filter's scores order right before wrong captions, at whatever threshold: the
    area under the ROC curve, and what thresholds find that are set on annotated drawings."""
    blip = load_blip(run)

    def scores(samples: Iterable[dict[str, Any]]) -> np.ndarray:
        found = []
        for some in batched(samples, 64):
            pixels = torch.stack([pixels_of(one["image"], blip.image_size) for one in some])
            captions = [one["captions"][0] for one in some]
            found.append(blip.match(blip.image_embeds(pixels), captions, range(len(some))))
        return torch.cat(found).numpy()

    def of(known: str) -> np.ndarray:
        return scores(one for one in samples_of(web) if one["id"].startswith(known))

    right, wrong, unseen = of("right/"), of("wrong/"), scores(samples_of(annotated))
    figures: dict[str, Any] = {"area under ROC": float((right[:, None] > wrong).mean())}
    for share in KEPT:
        threshold = np.quantile(unseen, 1 - share)
        found, alarms = (wrong < threshold).sum(), (right < threshold).sum()
        figures[f"threshold that keeps {share:.0%} of unseen annotated"] = {
            "threshold": float(threshold),
            "recall": float(found / len(wrong)),
            "precision": float(found / (found + alarms)),
            "right captions kept": float((right >= threshold).mean()),
        }
    return figures


def noise_found(out: Path) -> dict[str, Any]:
    """How well the filter finds the captions that are known to be wrong, and what it made of the
    icons' and of its captioner's."""
    kept: dict[str, list[str]] = {}
    for sample in samples_of(out / "data" / "web_capfilt"):
        kept[sample["id"]] = [origin["kind"] for origin in sample["annotations"]]
    ids = [sample["id"] for sample in samples_of(out / "data" / "web")]

    def share(known: str, kind: str) -> float:
        mine = [one for one in ids if one.startswith(known)]
        return sum(kind in kept.get(one, []) for one in mine) / len(mine)

    wrong, right = (sum(one.startswith(known) for one in ids) for known in ("wrong/", "right/"))
    found = wrong * (1 - share("wrong/", "web"))
    alarms = right * (1 - share("right/", "web"))
    return {
        "wrong captions": wrong,
        "right captions": right,
        "recall": found / wrong,
        "precision": found / (found + alarms),
        "precision of dropping at random": wrong / (wrong + right),
        "right captions kept": share("right/", "web"),
        "icons' captions kept": share("icon/", "web"),
        "synthetic captions kept": {
            known: share(f"{known}/", "synthetic") for known in ("right", "wrong", "icon")
        },
    }


def retrieval(out: Path) -> dict[str, Any]:
    """Held-out recalls of all runs, by set, direction and k: of each seed, and their means."""
    figures: dict[str, Any] = {}
    for kind in ("raw", "clean"):
        runs = [json.loads((out / f"{kind}_{s}" / run_folder.SUMMARY).read_text()) for s in SEEDS]
        for name in (n for n in runs[0]["evaluation"] if "itc_" in n):
            values = [run["evaluation"][name] for run in runs]
            figures.setdefault(name, {})[kind] = [*values, sum(values) / len(values)]
    return figures


if __name__ == "__main__":
    sys.exit(main())
