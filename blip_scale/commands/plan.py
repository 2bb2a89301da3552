"""Estimate the needs of a recipe on a cluster: `blip-scale plan base_129M`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip_scale.commands.chosen_recipe import chosen_recipe, warn_of_repeats
from blip_scale.commands.command_line import Parser, run_command, within
from blip_scale.config import checks, exit_codes, recipe
from blip_scale.planning.assumptions import GIB, Assumptions, duration
from blip_scale.planning.hardware import GPUS, find_gpu
from blip_scale.planning.plan import Plan, Way, make_plan
from blip_scale.planning.timing import EXECUTIONS, Cluster


def main(arguments: Sequence[str] | None = None, prog: str = "plan.py") -> int:
    """Run the command, and return its exit code: 0, or 2 for refused input."""
    options, overrides = _parser(prog).parse_known_args(arguments)
    return run_command(prog, lambda: _run(options, overrides))


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    plan = _plan(options, overrides)
    print(json.dumps(plan.to_json(), indent=1) if options.json else table(plan))
    return exit_codes.DONE


def _plan(options: argparse.Namespace, overrides: list[str]) -> Plan:
    chosen = recipe.load(options.recipe, overrides)
    checkpoint = chosen.model.checkpoint
    if checkpoint and Path(os.path.expandvars(checkpoint)).exists():
        chosen = chosen_recipe(options.recipe, overrides)
    else:
        warn_of_repeats(overrides)
    gpu = find_gpu(options.gpu)
    if options.network_gbit:
        gpu = dataclasses.replace(gpu, network_gbit=options.network_gbit)
    cluster = Cluster(
        options.nodes, options.gpus_per_node, gpu,
        efficiency=options.efficiency,
        module_call_s=options.module_us * 1e-6 if options.module_us else None,
    )  # fmt: skip
    from blip_scale.tasks.by_name import contrast_of  # slow (DeepSpeed): import after the checks

    kilobytes = options.sample_kb
    assumed = Assumptions(
        options.caption_tokens, kilobytes * 1e3 if kilobytes else None, pause_s=options.pause_s,
        restart_s=options.restart_s, hang_limit_s=options.hang_limit_s,
        failure_rate=options.failures,
    )  # fmt: skip
    return make_plan(chosen, _deepspeed(options), cluster, contrast_of, assumed, options.way)


def _deepspeed(options: argparse.Namespace) -> dict[str, Any]:
    """Read DeepSpeed's settings, and apply --zero and --offload."""
    stage = options.zero or 3
    name = "zero2" if stage < 3 else "zero3_offload" if options.offload else "zero3"
    path = options.deepspeed or checks.shipped_deepspeed(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        zero = config["zero_optimization"]
    except OSError as error:
        raise FileNotFoundError(f"--deepspeed {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--deepspeed {path}: not DeepSpeed's settings ({error!r})") from error
    if options.zero:
        zero["stage"] = options.zero
    if options.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return config


def table(plan: Plan) -> str:
    """Format the plan as text."""
    cluster, sizes, way, data = plan.cluster, plan.sizes, plan.way, plan.to_json()["data"]
    parameters = sum(plan.network.trainable) / 1e6
    offload = ", optimizer on the host" if plan.offload else ""
    fast, _, slow = way.seconds
    lines = [
        f"{plan.verdict}",
        *(f"warning: {warning}" for warning in plan.warnings),
        *([f"faster: {plan.advice}"] if plan.advice else []),
        "",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs, ZeRO-{plan.stage}{offload}, "
        f"{parameters:.1f}M trainable parameters",
        f"batch {sizes.global_batch} = {sizes.world_size} ranks x {sizes.micro_batch} x "
        f"{sizes.accumulation} micro-steps; largest that fits with headroom and divides: "
        f"{plan.max_micro_batch} (that fits at all: {plan.largest_micro_batch})",
        "",
        "memory a GPU, GiB",
        *(_row(name, value / GIB) for name, value in plan.memory.terms.items() if value > 1e6),
        _row("total", plan.memory.total / GIB),
    ]
    if plan.memory.host:
        lines.append(_row("on the host, a node", plan.memory.host * cluster.gpus_per_node / GIB))
    lines += [
        "",
        f"optimizer step, ms ({plan.steps} of them)        fast  expected      slow",
        *_step_rows(way),
        "",
        *_way_rows(plan),
        *_exchange_rows(plan),
        "",
        f"time      {duration(plan.seconds)} ({duration(plan.steps * fast)} to "
        f"{duration(plan.steps * slow)}), {plan.seconds / 3600 * cluster.ranks:.0f} GPU-hours, "
        f"{plan.samples_per_s:.0f} pairs/s, {way.expected.mfu:.0%} MFU",
        f"data      {data['images_per_s_per_node']:.0f} images/s and "
        f"{data['mb_per_s_per_node']:.0f} MB/s a node, {plan.cores_a_gpu:.1f} CPU cores a GPU",
        f"storage   {data['shards_tib']:.2f} TiB of shards ({plan.volume.samples / 1e6:.1f}M "
        f"images), {data['checkpoint_gib']:.1f} GiB a checkpoint ({plan.kept_checkpoints} kept)",
        "",
        "assumed",
        *(f"  - {assumption}" for assumption in plan.assumptions),
    ]
    return "\n".join(lines)


def _step_rows(way: Way) -> list[str]:
    """Format the parts of a step, in ms."""
    parts = {
        "kernels": "kernels_s",
        "host (launching)": "host_s",
        "weights and gradients, hidden": "exchanges_s",
        "update and exchanges not hidden": "update_s",
        "total": "total_s",
    }
    rows = []
    for label, name in parts.items():
        values = [getattr(step, name) * 1e3 for step in (way.fast, way.expected, way.slow)]
        rows.append(f"  {label:32}" + "".join(f"{value:10.1f}" for value in values))
    return rows


def _way_rows(plan: Plan) -> list[str]:
    """Format every way to execute the steps, with the planned one first."""
    rows = [f"{'ways to run it (the first is planned)':40}{'ms a step':>16}{'pairs/s':>16}"
            f"{'GiB':>8}  limit"]  # fmt: skip
    batch = plan.sizes.global_batch
    for way in plan.ways:
        fast, _, slow = way.seconds
        span = f"{fast * 1e3:.0f} to {slow * 1e3:.0f}"
        rate = f"{batch / slow:.0f} to {batch / fast:.0f}"
        held = way.memory.total / GIB
        label = f"{way.execution.name} (--way {way.name})"
        rows.append(f"  {label:38}{span:>16}{rate:>16}{held:8.1f}  {way.expected.limit}")
    return rows


def _exchange_rows(plan: Plan) -> list[str]:
    """Format the communication of a step, for partitioned and for whole weights.

    Return no lines for one rank.
    """
    ways = {way.execution.whole: way for way in plan.ways if way.exchanges}
    if not ways:
        return []
    rows = ["", f"{'exchanges a step':34}{'calls':>8}{'GB':>10}{'ms':>10}"]
    for whole, way in ways.items():
        held = "whole" if whole else "partitioned"
        for item in way.exchanges:
            hidden = "  hidden" if item.hidden else ""
            rows.append(
                f"  {f'{held}: {item.name}':32}{item.calls:8}{item.data_bytes / 1e9:10.3f}"
                f"{item.seconds * 1e3:10.1f}{hidden}"
            )
    return rows


def _row(name: str, value: float, digits: int = 2) -> str:
    return f"  {name.replace('_', ' '):32}{value:10.{digits}f}"


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage="blip-scale plan RECIPE [SETTING=VALUE ...] --nodes N --gpus-per-node G "
        "--gpu NAME [--zero 1|2|3] [--offload] [--way partitioned|whole|graph] [--json]",
        description="Estimate memory per GPU, time, data rate and storage of a recipe on a "
        "cluster. Settings override the recipe by dotted name, as in train.py. Exit code 2: "
        "refused input.",
        allow_abbrev=False,
    )
    positive = within(float, 0.001, 1_000_000)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help=f"one of {', '.join(recipe.names())}, or a YAML file")
    add(
        "--nodes",
        type=within(int, 1, 100_000),
        default=1,
        metavar="N",
        help="number of machines (default: 1)",
    )
    add("--gpus-per-node", type=within(int, 1, 1024), default=8, metavar="G",
        help="GPUs per node (default: 8)")  # fmt: skip
    add("--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(GPUS)} (default: h100)")
    add("--zero", type=int, choices=(1, 2, 3), help="ZeRO stage (default: that of the file, 3)")
    add("--offload", action="store_true", help="keep optimizer and gradients in host memory")
    add(
        "--deepspeed",
        type=Path,
        metavar="PATH",
        help="DeepSpeed JSON (default: the file in ds_configs/ for the stage)",
    )
    add(
        "--network-gbit",
        type=positive,
        metavar="X",
        help="bandwidth of a node's network in Gbit/s, all cards together (default: by GPU)",
    )
    add(
        "--way",
        choices=tuple(EXECUTIONS),
        help="execution of steps: eager with partitioned or whole weights, or as a CUDA graph "
        "(default: eager, with weights as in the ZeRO stage)",
    )
    add(
        "--efficiency",
        type=within(float, 0.001, 1),
        metavar="SHARE",
        help="share of peak speed that kernels reach (default: a range from measurements)",
    )
    add(
        "--module-us",
        type=positive,
        metavar="US",
        help="host time per module call in microseconds (default: a range from measurements)",
    )
    add("--caption-tokens", type=within(float, 1, 100_000), default=Assumptions.tokens_each,
        metavar="T",
        help="mean tokens per caption, [CLS] and [SEP] included (default: 12.5)")  # fmt: skip
    add("--sample-kb", type=positive, metavar="KB",
        help="size of a stored sample in kB (default: 30)")  # fmt: skip
    add("--failures", type=within(float, 0.001, 100_000), metavar="N",
        help="failures per 1,000 node-days (default: 6.5, from 3.8 to 26)")  # fmt: skip
    add("--pause-s", type=positive, metavar="S",
        help="pause for a checkpoint, checkpoint/pause_s of a run (default: by size)")  # fmt: skip
    add("--restart-s", type=positive, metavar="S",
        help="time from a failure to the next step (default: 120)")  # fmt: skip
    add("--hang-limit-s", type=positive, metavar="S",
        help="time until a hang is noticed (default: 180)")  # fmt: skip
    add("--json", action="store_true", help="one JSON object instead of the table")
    return parser
