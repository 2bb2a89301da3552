"""`benchmark.py objectives`: short pretrainings with various losses, image sizes and towers."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip_scale.storage import run_folder

REPO = Path(__file__).resolve().parents[2]
_MOMENTUM = (
    "objective.itc=momentum", "objective.queue_size=64", "objective.momentum=0.9",
    "objective.alpha_ramp_epochs=9",
)  # fmt: skip
_SIGMOID = ("objective.itc=sigmoid", "objective.temperature=0.1")
_TOWERS = ("objective.itm=none", "objective.lm=none")
_SIZES = "data.image_sizes=[{size: 32, until_epoch: SHARE_60}, {size: 48, until_epoch: SHARE_90}]"
VARIANTS: dict[str, tuple[str, ...]] = {
    "BLIP": _MOMENTUM,
    "ITC in_batch": ("objective.itc=in_batch",),
    "ITC sigmoid": _SIGMOID,
    "no ITM": (*_MOMENTUM, "objective.itm=none"),
    "no LM": (*_MOMENTUM, "objective.lm=none"),
    "ITC in_batch alone": ("objective.itc=in_batch", *_TOWERS),
    "ITC sigmoid alone": (*_SIGMOID, *_TOWERS),
    "image sizes": (*_MOMENTUM, _SIZES),
    "patch dropout 0.25": (*_MOMENTUM, "model.vision.patch_dropout=0.25"),
    "sizes and dropout": (*_MOMENTUM, _SIZES, "model.vision.patch_dropout=0.25"),
    "SigLIP tower": (*_MOMENTUM, "model.vision.name=vit_base_patch16_siglip_224"),
    "DINOv3 tower": (*_MOMENTUM, "model.vision.name=vit_small_patch16_dinov3"),
    "EVA02 tower": (*_MOMENTUM, "model.vision.name=eva02_base_patch16_clip_224"),
}
"""Row of the table -> settings that differ from the recipe. SHARE_60 and SHARE_90 stand for the
epochs (fractional) at 60 % and 90 % of the steps."""
_FIGURES = {
    "itc_image_to_text_r10": "R@10, image to text",
    "itc_text_to_image_r10": "R@10, text to image",
    "itm_image_to_text_r1": "R@1 re-ranked, image to text",
    "exact": "captions exactly right",
}
"""Held-out metric of the first set -> head of its column. All are shares."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every variant with every seed. Finished runs in `--out` are kept."""
    with tempfile.TemporaryDirectory(prefix="objectives-") as folder:
        out = Path(options.out or folder).resolve()
        rows: dict[str, dict[str, dict[str, float]]] = {}
        for name in options.variants:
            runs = [_figures(_train(name, seed, out, options)) for seed in range(options.seeds)]
            rows[name] = {"mean": _over(runs, statistics.fmean)}
            if len(runs) > 1:
                rows[name]["deviation"] = _over(runs, statistics.stdev)
    return {"steps": options.steps, "seeds": options.seeds, "rows": rows}


def _over(
    runs: list[dict[str, float]], statistic: Callable[[list[float]], float]
) -> dict[str, float]:
    """Apply a statistic to each figure over runs."""
    return {figure: statistic([run[figure] for run in runs]) for figure in runs[0]}


def _train(name: str, seed: int, out: Path, options: argparse.Namespace) -> Path:
    """Pretrain on one rank. Returns the folder of the run.

    Raises:
        RuntimeError: training failed. The message has the last line of its error output.
    """
    run = out / f"{name.replace(' ', '_')}_{seed}"
    if (run / run_folder.SUMMARY).is_file():
        return run
    # max_steps ends the run earlier than the recipe's epochs.
    epochs = options.steps / options.steps_per_epoch
    settings = [
        text.replace("SHARE_60", f"{0.6 * epochs:.4f}").replace("SHARE_90", f"{0.9 * epochs:.4f}")
        for text in VARIANTS[name]
    ]
    command = [
        sys.executable, str(REPO / "blip_scale" / "train.py"), "--recipe", options.recipe,
        f"output_dir={run}", f"seed={seed}", f"train.max_steps={options.steps}",
        "log.every_steps=10", "evaluation.every_steps=1000000", "checkpoint.every_steps=1000000",
        *settings, *options.settings,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{name}, seed {seed}: {process.stderr.strip().splitlines()[-1]}")
    return run


def _figures(run: Path) -> dict[str, float]:
    """Held-out shares of the first set, seconds of a step, and peak memory of a finished run."""
    summary = json.loads((run / run_folder.SUMMARY).read_text(encoding="utf-8"))
    evaluation = summary["evaluation"]
    first = next(iter(evaluation)).partition("/")[0]
    lines = (run / run_folder.METRICS).read_text(encoding="utf-8").splitlines()
    points = [point for point in map(json.loads, lines) if "speed/samples_per_s" in point]
    batch = points[0]["samples"] / points[0]["step"]
    figures = {name: evaluation.get(f"{first}/{name}") for name in _FIGURES}
    figures["step_s"] = statistics.fmean(batch / p["speed/samples_per_s"] for p in points[1:])
    figures["peak_gib"] = points[-1]["memory/peak_gib"]
    return {name: value for name, value in figures.items() if value is not None}


def show(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    heads = ["", *_FIGURES.values(), "s a step", "GiB"]
    lines = [
        f"{result['steps']} steps, {result['seeds']} seed(s)",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for name, row in result["rows"].items():
        shares = [_share(row, figure) for figure in _FIGURES]
        mean = row["mean"]
        cells = [name, *shares, f"{mean['step_s']:.3f}", f"{mean['peak_gib']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(row: dict[str, dict[str, float]], figure: str) -> str:
    """Cell with the mean in percent, and the standard deviation over seeds if there are several."""
    if figure not in row["mean"]:
        return "-"
    cell = f"{100 * row['mean'][figure]:.1f}"
    if "deviation" in row:
        cell += f" ± {100 * row['deviation'][figure]:.1f}"
    return f"{cell} %"


def add_objectives(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser(
        "objectives",
        help="short pretrainings with other losses, image sizes and towers",
        description="Run short pretrainings on one rank, one after another, with BLIP's losses and "
        "with one change at a time. The table shows held-out recall, captions, seconds per step "
        "and peak memory. Make the demo's data first: `tools/prepare_data.py demo data/demo`.",
    )
    command.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of all runs")
    command.add_argument("--recipe", default="demo", help="default: demo")
    command.add_argument("--steps", type=int, default=200, help="steps per run (default: 200)")
    command.add_argument(
        "--steps-per-epoch",
        type=float,
        default=108,
        help="steps per epoch of the recipe (default: 108, the demo)",
    )
    command.add_argument("--seeds", type=int, default=1, help="runs per variant (default: 1)")
    command.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    command.add_argument("--out", type=Path, help="folder that keeps the runs (default: none)")
    command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(measure=measure, show=show)
