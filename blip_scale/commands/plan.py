"""What a recipe will need on a cluster, before it is queued: `python tools/plan.py base_129M`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip_scale.commands.command_line import Parser, report_error
from blip_scale.config import checks, recipe
from blip_scale.planning.hardware import (
    GPUS,
    find_gpu,
)
from blip_scale.planning.plan import (
    GIB,
    Assumptions,
    Plan,
    make_plan,
)
from blip_scale.planning.timing import Cluster


def main(arguments: Sequence[str] | None = None, prog: str = "plan.py") -> int:
    options, overrides = _parser(prog).parse_known_args(arguments)
    try:
        plan = _plan(options, overrides)
    except (ValueError, FileNotFoundError) as error:
        return report_error(prog, error)
    print(json.dumps(plan.to_json(), indent=1) if options.json else table(plan))
    return 0


def _plan(options: argparse.Namespace, overrides: list[str]) -> Plan:
    chosen = recipe.load(options.recipe, overrides)
    gpu = find_gpu(options.gpu)
    if options.network_gbit:
        gpu = dataclasses.replace(gpu, network_gbit=options.network_gbit)
    cluster = Cluster(
        options.nodes, options.gpus_per_node, gpu,
        efficiency=options.efficiency, module_call_s=options.module_us * 1e-6,
    )  # fmt: skip
    kilobytes = options.sample_kb
    assumed = Assumptions(options.caption_tokens, kilobytes * 1e3 if kilobytes else None)
    return make_plan(chosen, _deepspeed(options), cluster, assumed)


def _deepspeed(options: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's settings: the file's, with the stage and the offload that were asked for."""
    stage = options.zero or 3
    name = "zero2" if stage < 3 else "zero3_offload" if options.offload else "zero3"
    path = options.deepspeed or checks.shipped_deepspeed(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        zero = config["zero_optimization"]
    except OSError as error:
        raise FileNotFoundError(f"--deepspeed {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--deepspeed {path}: not DeepSpeed's settings ({error!r})") from error
    if options.zero:
        zero["stage"] = options.zero
    if options.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return config


def table(plan: Plan) -> str:
    """The plan as text."""
    cluster, sizes, step, data = plan.cluster, plan.sizes, plan.step, plan.to_json()["data"]
    parameters = sum(plan.network.trainable) / 1e6
    offload = ", optimizer on the host" if plan.offload else ""
    lines = [
        f"{plan.verdict}",
        *(f"warning: {warning}" for warning in plan.warnings),
        "",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs, ZeRO-{plan.stage}{offload}, "
        f"{parameters:.1f}M trainable parameters",
        f"batch {sizes.global_batch} = {sizes.world_size} ranks x {sizes.micro_batch} x "
        f"{sizes.accumulation} micro-steps; largest that fits and divides: {plan.max_micro_batch} "
        f"(that fits at all: {plan.largest_micro_batch})",
        "",
        "memory a GPU, GiB",
        *(_row(name, value / GIB) for name, value in plan.memory.terms.items() if value > 1e6),
        _row("total", plan.memory.total / GIB),
    ]
    if plan.memory.host:
        lines.append(_row("on the host, a node", plan.memory.host * cluster.gpus_per_node / GIB))
    lines += [
        "",
        f"optimizer step, ms ({plan.steps} of them; {step.mfu:.0%} MFU)",
        _row("compute", step.compute_s * 1e3, 1),
        _row("host (launching)", step.host_s * 1e3, 1),
        _row("weights and gradients exchanged", step.communication_s * 1e3, 1),
        _row("update, features", step.update_s * 1e3, 1),
        _row("total", step.total_s * 1e3, 1),
        "",
        f"time      {plan.seconds / 86_400:.2f} days, "
        f"{plan.seconds / 3600 * cluster.ranks:.0f} GPU-hours, {plan.samples_per_s:.0f} pairs/s",
        f"data      {data['images_per_s_per_node']:.0f} images/s and "
        f"{data['mb_per_s_per_node']:.0f} MB/s a node, {plan.cores_a_gpu:.1f} CPU cores a GPU",
        f"storage   {data['shards_tib']:.2f} TiB of shards ({plan.volume.samples / 1e6:.1f}M "
        f"images), {data['checkpoint_gib']:.1f} GiB a checkpoint ({plan.kept_checkpoints} kept)",
        "",
        "assumed",
        *(f"  - {assumption}" for assumption in plan.assumptions),
    ]
    return "\n".join(lines)


def _row(name: str, value: float, digits: int = 2) -> str:
    return f"  {name.replace('_', ' '):32}{value:10.{digits}f}"


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage="python tools/plan.py RECIPE [SETTING=VALUE ...] --nodes N --gpus-per-node G "
        "--gpu NAME [--zero 1|2|3] [--offload] [--json]",
        description="Memory a GPU, time, data rate and storage of a recipe on a cluster, on paper. "
        "Settings are the recipe's, by dotted name, as in train.py. Exit code 2: refused input.",
        allow_abbrev=False,
    )
    count, number = _positive(int), _positive(float)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help=f"one of {', '.join(recipe.names())}, or a YAML file")
    add("--nodes", type=count, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus-per-node", type=count, default=8, metavar="G", help="default: 8")
    add("--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(GPUS)} (default: h100)")
    add("--zero", type=int, choices=(1, 2, 3), help="ZeRO stage (default: the file's, 3)")
    add("--offload", action="store_true", help="keep optimizer and gradients in host memory")
    add("--deepspeed", type=Path, metavar="PATH", help="default: ds_configs/ of that stage")
    add(
        "--network-gbit",
        type=number,
        metavar="X",
        help="network of a node, all cards together (default: that of the GPU)",
    )
    add("--efficiency", type=number, default=Cluster.efficiency, metavar="SHARE",
        help="share of the peak that matrix products reach (default: 0.4)")  # fmt: skip
    add("--module-us", type=number, default=Cluster.module_call_s * 1e6, metavar="US",
        help="host time to call a module, in microseconds (default: 60)")  # fmt: skip
    add("--caption-tokens", type=number, default=Assumptions.tokens_each, metavar="T",
        help="mean tokens of a caption, [CLS] and [SEP] included (default: 12.5)")  # fmt: skip
    add(
        "--sample-kb", type=number, metavar="KB", help="size of a stored sample in kB (default: 30)"
    )
    add("--json", action="store_true", help="one JSON object instead of the table")
    return parser
