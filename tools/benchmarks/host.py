"""`tools/benchmark.py host`: the host's work in a step, on a CPU.

The network has full depth but a tiny width, and runs on one thread. Arithmetic takes almost no
time, so the CPU seconds approximate the host time of a step on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from blip_scale.config import recipe

NAMES = ("plain", "ours", "published")
"""Contenders, in the order of their turns."""
TITLES = {"plain": "ours, plain PyTorch", "ours": "ours, ZeRO-3", "published": "published form"}
RATIOS = {
    "ours_to_plain": ("ours", "plain"),
    "plain_to_published": ("plain", "published"),
    "ours_to_published": ("ours", "published"),
}
"""Name of a ratio -> contenders in numerator and denominator."""
TINY_WIDTH = (
    "model.vision.image_size=32",
    "model.vision.overrides={embed_dim: 48, num_heads: 12}",
    "model.text.width=48",
    "model.text.mlp_width=192",
    "model.embed_dim=16",
    "objective.queue_size=64",
)
"""Settings of a tiny width that keep the depth and the number of heads."""
_VOCABULARY = 500


def host(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds, operations and Python calls of each contender, and ratios of CPU seconds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from tools.benchmarks.growth import OFFLINE
    from tools.benchmarks.step_contenders import Contender, Match, StepContest, make_match
    from tools.benchmarks.vocabulary import make_tokenizer

    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        tokenizer = make_tokenizer(folder / "tokenizer", _VOCABULARY)
        settings = [
            *OFFLINE,
            *TINY_WIDTH,
            f"model.text.tokenizer={tokenizer}",
            f"train.precision={options.precision}",
            f"train.global_batch_size={options.batch_size}",
            f"train.micro_batch_size={options.batch_size}",
            *options.settings,
        ]
        made = make_match(recipe.load(options.recipe, settings), options.deepspeed, 1, folder)
        match = Match(made.recipe, made.ds_config, 1, folder, onednn=False)
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        with StepContest({name: Contender(name, match) for name in NAMES}) as contest:
            for _ in range(options.rounds):
                for name in NAMES:
                    seconds[name].append(contest.ask(name, "cpu_seconds"))
            counted = {name: contest.ask(name, "host_work") for name in NAMES}
    ratios = {}
    for name, (above, below) in RATIOS.items():
        pairs = zip(seconds[above], seconds[below], strict=True)
        ratios[name] = round(statistics.median(a / b for a, b in pairs), 3)
    contenders = {}
    for name in NAMES:
        median = statistics.median(seconds[name])
        contenders[name] = {
            "cpu_seconds": round(median, 4),
            "least_cpu_seconds": round(min(seconds[name]), 4),
            **counted[name],
        }
    return {
        "precision": options.precision,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "contenders": contenders,
        **ratios,
    }


def host_table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['precision']}, batch {result['batch_size']}, {result['rounds']} rounds",
        f"{'':22}{'CPU s a step':>14}{'least':>8}{'operations':>12}{'Python calls':>14}",
    ]
    for name, row in result["contenders"].items():
        lines.append(
            f"{TITLES[name]:22}{row['cpu_seconds']:14.3f}{row['least_cpu_seconds']:8.3f}"
            f"{row['operations']:12,}{row['python_calls']:14,}"
        )
    for name, (above, below) in RATIOS.items():
        lines.append(f"{TITLES[above]} / {TITLES[below]}: {result[name]:.2f}")
    return "\n".join(lines)


def add_host(commands: Any, ds_config: Path) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "host",
        help="the host's work in a step: CPU seconds at full depth and tiny width",
        description="Measure CPU seconds of an optimizer step on one thread, for our step in plain "
        "PyTorch, our step under ZeRO-3, and the published step, in turns. The network has "
        "base_129M's depth and a width of 48, so the result approximates the host time of a step "
        "on a GPU. Ratios are medians over rounds.",
    )
    command.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="of the recipe")
    command.add_argument("--recipe", default="base_129M", help="default: base_129M")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    command.add_argument("--batch-size", type=int, default=4, help="default: 4")
    command.add_argument(
        "--rounds", type=int, default=9, help="timed steps per contender (default: 9)"
    )
    command.add_argument("--deepspeed", default=str(ds_config))
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(measure=host, show=host_table)
