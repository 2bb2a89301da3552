"""Measure CapFilt's effect on retrieval: train on noisy pairs, and on the same pairs after CapFilt.

The pairs are the demo's, with a known share of wrong captions.

    python tools/prepare_data.py demo data/demo
    python tools/benchmarks/capfilt_experiment.py data/demo runs/capfilt

Finished work is kept; run the same command to resume. docs/capfilt.md has the results.
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
"""Share of the web drawings that get the caption of another drawing."""
HELDOUT = ("heldout_drawing", "heldout_concept")
SMALL = (
    # A network that trains in minutes on two CPU cores, and whose matching head learns in a few
    # hundred steps. All runs have the same number of steps and learning rates.
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
    "objective.itm=global",
    "optimizer.lr_decay=0.95",
    "optimizer.peak_lr=1.0e-3",
    "optimizer.warmup_steps=50",
)
KEPT = (0.7, 0.5)
"""Shares of the captions of unseen drawings that the tested thresholds keep. A filter trained on
hard negatives gives low scores, so the default threshold of 0.5 would drop too many."""


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="folder that `prepare_data.py demo` made")
    parser.add_argument("out", type=Path, help="folder for sets, runs and figures.json")
    parser.add_argument(
        "--steps", type=int, default=600, help="steps of each pretraining (default: 600)"
    )
    parser.add_argument(
        "--tuning-steps", type=int, default=900, help="steps of fine-tuning (default: 900)"
    )
    options = parser.parse_args(arguments)
    demo, out, steps = options.demo.resolve(), options.out.resolve(), options.steps
    sizes = make_sets(demo, out / "data")
    raw = {name: (out / "data" / name, sizes[name]) for name in ("annotated", "web")}
    train(demo, out / "raw_0", raw, steps, "seed=0")
    annotated = {"annotated": raw["annotated"]}
    # The captioner needs a third of the filter's steps.
    tuned = (("filter", "retrieval", 1), ("captioner", "captioning", 3))
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
    filter_figures = noise_found(out) | scores
    figures = {"filter": filter_figures, "retrieval": retrieval(out), "statistics": statistics}
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: figures[name] for name in ("filter", "retrieval")}, indent=1))
    return 0


def make_sets(demo: Path, out: Path) -> dict[str, int]:
    """Write the sets `annotated` and `web`, and return their numbers of pairs.

    `annotated` holds OpenMoji's drawings and stands for human-annotated pairs. `web` holds the
    other drawings, with the captions of a share `WRONG` swapped, and all icons with their paths as
    captions. The ids of `web` begin with right/, wrong/ or icon/.
    """
    rng = np.random.default_rng(0)
    emoji = list(samples_of(demo / "emoji"))
    annotated = [sample for sample in emoji if sample["source"] == "openmoji"]
    web = [sample for sample in emoji if sample["source"] != "openmoji"]
    swapped = rng.choice(len(web), round(WRONG * len(web)), replace=False)
    captions: dict[int, list[str]] = {}
    for i, j in zip(swapped, np.roll(swapped, 1), strict=True):
        captions[int(i)] = web[int(j)]["captions"]
    records = []
    for i, sample in enumerate(web):
        prefix = "wrong/" if i in captions else "right/"
        records.append(_record(sample, prefix, captions.get(i)))
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


def _record(sample: dict[str, Any], prefix: str = "", captions: list[str] | None = None) -> Record:
    fields = {key: sample[key] for key in ("image", "source", "width", "height")}
    return Record(f"{prefix}{sample['id']}", caption=captions or sample["captions"], **fields)


def train(
    demo: Path, run: Path, sets: dict[str, tuple[Path, int]], steps: int, *settings: str
) -> None:
    """Train a run unless it is finished. The weight of each set is its number of texts."""
    if (run / run_folder.SUMMARY).is_file():
        return
    streams = [{"name": n, "local": str(p), "weight": texts} for n, (p, texts) in sets.items()]
    heldout = [{"name": name, "local": str(demo / name)} for name in HELDOUT]
    overrides = [
        *(setting.replace("TEXT", str(demo / "text")) for setting in SMALL),
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
    subprocess.run([*command, *overrides], check=True, cwd=REPO)


def filtered(out: Path) -> dict[str, Any]:
    """Run CapFilt on the web set, and return its statistics."""
    clean = out / "data" / "web_capfilt"
    command = [sys.executable, str(REPO / "tools" / "capfilt.py"), str(out / "data" / "web")]
    command += [str(clean), "--captioner", str(out / "captioner"), "--filter", str(out / "filter")]
    command += ["--min-tokens", "2", "--max-tokens", "12", "--workers", str(os.cpu_count() or 1)]
    subprocess.run(command, check=True)
    statistics: dict[str, Any] = json.loads((clean / "statistics.json").read_text())
    return statistics


def selectivity(run: Path, web: Path, annotated: Path) -> dict[str, Any]:
    """Measure how well a filter's scores separate right captions from wrong ones.

    Returns:
        area under the ROC curve, and recall and precision at thresholds chosen on annotated
        drawings.
    """
    blip = load_blip(run)

    def scores(samples: Iterable[dict[str, Any]]) -> np.ndarray:
        logits = []
        for batch in batched(samples, 64):
            pixels = torch.stack([pixels_of(s["image"], blip.image_size) for s in batch])
            captions = [sample["captions"][0] for sample in batch]
            logits.append(blip.match(blip.image_embeds(pixels), captions, range(len(batch))))
        return torch.cat(logits).numpy()

    def scores_of_web(prefix: str) -> np.ndarray:
        return scores(sample for sample in samples_of(web) if sample["id"].startswith(prefix))

    right, wrong = scores_of_web("right/"), scores_of_web("wrong/")
    unseen = scores(samples_of(annotated))
    figures: dict[str, Any] = {"area under ROC": float((right[:, None] > wrong).mean())}
    for share in KEPT:
        threshold = np.quantile(unseen, 1 - share)
        dropped, alarms = (wrong < threshold).sum(), (right < threshold).sum()
        figures[f"threshold that keeps {share:.0%} of unseen annotated"] = {
            "threshold": float(threshold),
            "recall": float(dropped / len(wrong)),
            "precision": float(dropped / (dropped + alarms)),
            "right captions kept": float((right >= threshold).mean()),
        }
    return figures


def noise_found(out: Path) -> dict[str, Any]:
    """Recall and precision of dropping wrong captions, and shares of other captions kept."""
    kept: dict[str, list[str]] = {}
    for sample in samples_of(out / "data" / "web_capfilt"):
        kept[sample["id"]] = [origin["kind"] for origin in sample["annotations"]]
    ids = [sample["id"] for sample in samples_of(out / "data" / "web")]

    def share(prefix: str, kind: str) -> float:
        chosen = [name for name in ids if name.startswith(prefix)]
        return sum(kind in kept.get(name, []) for name in chosen) / len(chosen)

    wrong = sum(name.startswith("wrong/") for name in ids)
    right = sum(name.startswith("right/") for name in ids)
    dropped = wrong * (1 - share("wrong/", "web"))
    alarms = right * (1 - share("right/", "web"))
    return {
        "wrong captions": wrong,
        "right captions": right,
        "recall": dropped / wrong,
        "precision": dropped / (dropped + alarms),
        "precision of dropping at random": wrong / (wrong + right),
        "right captions kept": share("right/", "web"),
        "icons' captions kept": share("icon/", "web"),
        "synthetic captions kept": {
            kind: share(f"{kind}/", "synthetic") for kind in ("right", "wrong", "icon")
        },
    }


def retrieval(out: Path) -> dict[str, Any]:
    """Held-out recalls of all runs by set, direction and k, for each seed and their mean."""
    figures: dict[str, Any] = {}
    for kind in ("raw", "clean"):
        runs = [json.loads((out / f"{kind}_{s}" / run_folder.SUMMARY).read_text()) for s in SEEDS]
        for name in (n for n in runs[0]["evaluation"] if "itc_" in n):
            values = [run["evaluation"][name] for run in runs]
            figures.setdefault(name, {})[kind] = [*values, sum(values) / len(values)]
    return figures


if __name__ == "__main__":
    sys.exit(main())
