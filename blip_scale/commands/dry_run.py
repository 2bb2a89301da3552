"""Check a setup for common causes of failed runs: `train.py --dry-run`.

A dry run needs only one process and no GPU, so it can run on a login node before a job is queued.
It can also be launched on the allocated nodes like a training run. Each check reports ok, warning
or FAILED, with the fix. A failed check does not stop the others, so one dry run shows all problems.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blip_scale.commands.command_line import within
from blip_scale.config import checks
from blip_scale.config.batch_sizes import is_auto
from blip_scale.config.recipe import Recipe, StreamRecipe
from blip_scale.engine.watching.loggers import registry
from blip_scale.planning.hardware import GPU, find_gpu
from blip_scale.storage.free_space import free_bytes, parse_bytes

if TYPE_CHECKING:
    from blip_scale.planning.plan import Plan

logger = logging.getLogger("blip_scale.commands.dry_run")

BAD = 2
"""Exit code if a check failed."""
_RETRY_S = 20.0
_EXCHANGE_BYTES = 64 * 2**20
_EXCHANGE_TIMEOUT_S = 300.0  # a rank that needs longer to connect is assumed never to connect
_GB = 1e9
_PROCESS_GB = 3.0
"""Estimated host memory of a rank without weights (rule of thumb): Python, torch and pinned
batches. A loader worker needs one third of this."""

_LEVELS = ("ok", "warning", "FAILED")


class Doubt(Exception):
    """Raised by a check for a problem that may or may not make the run fail."""


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    name: str
    level: int
    """0: ok, 1: warning, 2: FAILED."""
    message: str


@dataclass(frozen=True)
class Setting:
    """Input of the checks."""

    recipe: Recipe
    ds_config: Path
    ranks: int
    gpus_per_node: int
    gpu: GPU | None
    """GPU named by the user; None: the GPU of this machine."""

    def plan(self) -> Plan:
        """Plan the run on these ranks."""
        from blip_scale.planning.assumptions import Assumptions
        from blip_scale.planning.plan import make_plan
        from blip_scale.planning.timing import Cluster
        from blip_scale.tasks.by_name import contrast_of

        nodes = self.ranks // self.gpus_per_node
        cluster = Cluster(nodes, self.gpus_per_node, self._gpu())
        # Another check reports a missing stream. Memory and disk do not depend on its size.
        assumed = Assumptions(unknown_samples=10**6)
        try:
            config = checks.resolve_deepspeed(self.recipe, self.ds_config, self.ranks)
            return make_plan(self.recipe, config, cluster, contrast_of, assumed)
        except (ValueError, FileNotFoundError) as error:  # another check reports this failure
            raise Doubt(f"cannot be planned: {error}") from error

    def _gpu(self) -> GPU:
        """Return the GPU named by the user, else an H100 with the memory of this machine's GPU.

        If this machine has no GPU, the memory is unlimited.
        """
        import torch

        from blip_scale.planning.assumptions import GIB
        from blip_scale.planning.hardware import GPUS

        if self.gpu is not None:
            return self.gpu
        if torch.cuda.is_available():
            memory_gib = torch.cuda.get_device_properties(0).total_memory / GIB
            return dataclasses.replace(GPUS["h100"], memory_gib=memory_gib)
        return dataclasses.replace(GPUS["h100"], memory_gib=math.inf)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a dry run."""
    add = parser.add_argument
    add(
        "--dry-run",
        action="store_true",
        help="check for common causes of failed runs, without training",
    )
    add(
        "--ranks",
        type=within(int, 1, 1_000_000),
        help="for --dry-run: number of ranks of the run (default: the launcher's, or 1)",
    )
    add(
        "--gpus-per-node",
        type=within(int, 1, 1024),
        help="for --dry-run: number of ranks per node (default: the launcher's, or 8)",
    )
    add("--gpu", help="for --dry-run: GPU of the run, such as h100 (default: this machine's)")


def run(recipe: Recipe, options: argparse.Namespace) -> int:
    """Run all checks, and return 0, or 2 if a check failed. Every launched rank must call this.

    Raises:
        ValueError: --gpu matches no known GPU, or more than one.
    """
    gpu = find_gpu(options.gpu) if options.gpu else None
    # Imported late, so that refused input is reported without waiting for the import of torch.
    from blip_scale import logs
    from blip_scale.engine import collectives

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = options.ranks or max(world_size, int(os.environ.get("SLURM_NTASKS", "1")))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "8")))
    per_node = math.gcd(ranks, min(ranks, options.gpus_per_node or local))
    setting = Setting(recipe, Path(options.deepspeed), ranks, per_node, gpu)
    with tempfile.TemporaryDirectory(prefix="blip_scale_dry_run_") as folder:
        logs.set_up(Path(folder), int(os.environ.get("RANK", "0")))
        findings = [_try("launcher", lambda: _launcher(setting))]
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # check a node's disks and network once
            findings += [_try(name, check) for name, check in _checks(setting)]
        findings.append(_try("interconnect", lambda: _interconnect(world_size)))
        everyone = [findings]
        if world_size > 1 and findings[-1].level == 0:
            everyone = collectives.all_gather_objects(findings)
        if collectives.rank() == 0:
            _report(everyone, setting)
    worst = max(finding.level for part in everyone for finding in part)
    return BAD if worst == 2 else 0


def _checks(setting: Setting) -> list[tuple[str, Callable[[], str]]]:
    """Return the names and functions of the checks that run in one process per node."""
    recipe = setting.recipe
    named_checks: list[tuple[str, Callable[[], str]]] = [
        ("settings", lambda: _settings(setting)),
        ("batch", lambda: _batch(setting)),
        ("DeepSpeed", lambda: _deepspeed(setting)),
        ("attention", lambda: _attention(setting)),
        ("initial weights", lambda: _weights(recipe)),
    ]
    for stream in [*recipe.data.streams, *recipe.data.heldout]:
        named_checks.append((f"stream {stream.name}", partial(_stream, recipe, stream)))
    return [
        *named_checks,
        ("cache", lambda: _cache(recipe)),
        ("output", lambda: _output(setting)),
        ("checkpoints", lambda: _checkpoint_folder(recipe)),
        ("GPU memory", lambda: _gpu_memory(setting)),
        ("host memory", lambda: _host_memory(setting)),
        ("shared memory", lambda: _shared_memory(setting)),
    ]


def _try(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, 0, check())
    except Doubt as doubt:
        return Finding(name, 1, str(doubt))
    except Exception as error:  # any library may raise anything; the other checks must still run
        logger.debug("%s", name, exc_info=True)
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return Finding(name, 2, " ".join(f"{kind}{error}".split()))


def _report(everyone: list[list[Finding]], setting: Setting) -> None:
    """Log one line per check, with the worst result and its rank."""
    names = dict.fromkeys(finding.name for part in everyone for finding in part)
    failed = 0
    for name in names:
        worst, worst_rank = None, 0
        for rank, part in enumerate(everyone):
            for finding in part:
                if finding.name == name and (worst is None or finding.level > worst.level):
                    worst, worst_rank = finding, rank
        assert worst is not None
        failed += worst.level == 2
        who = f" (rank {worst_rank})" if worst.level and len(everyone) > 1 else ""
        logger.info("%-8s%s%s: %s", _LEVELS[worst.level], name, who, worst.message)
    state = f"{failed} of {len(names)} checks failed" if failed else "ready"
    logger.info("dry run for %d rank(s), %d a node: %s", setting.ranks, setting.gpus_per_node,
                state)  # fmt: skip


def _launcher(setting: Setting) -> str:
    """Check the launcher's environment variables, and check that this rank has a device."""
    import torch

    from blip_scale import launcher
    from blip_scale.engine.idle_gpus import refuse_idle_gpus

    refuse_idle_gpus()
    ranks = launcher.check_variables()
    if "RANK" not in os.environ:
        tasks = os.environ.get("SLURM_NTASKS")
        if tasks and int(tasks) > 1 and "SLURM_PROCID" in os.environ:
            raise Doubt(f"SLURM started {tasks} tasks, but RANK and WORLD_SIZE are not set")
        return "one process, no launcher"
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK {local_rank}, but the node shows {torch.cuda.device_count()} "
            "GPUs: start one rank per GPU"
        )
    return f"{ranks} ranks"


def _settings(setting: Setting) -> str:
    checks.check(setting.recipe, setting.ranks)
    registry.check(setting.recipe.log.to)
    return "no contradiction"


def _batch(setting: Setting) -> str:
    sizes = checks.batch_sizes(setting.recipe, setting.ranks)
    if is_auto(setting.recipe):
        plan = setting.plan()
        if math.isinf(plan.limit_bytes):
            raise Doubt("train.max_micro_batch_size: auto depends on the GPU: give --gpu NAME")
        sizes = plan.sizes
    return (
        f"{sizes.global_batch} = {sizes.world_size} ranks x {sizes.micro_batch} x "
        f"{sizes.accumulation} micro-steps"
    )


def _deepspeed(setting: Setting) -> str:
    config = checks.resolve_deepspeed(setting.recipe, setting.ds_config, setting.ranks)
    return f"{setting.ds_config}, ZeRO-{config['zero_optimization']['stage']}"


def _attention(setting: Setting) -> str:
    """Choose the attention kernel in the same way as a run does at its start."""
    import torch

    from blip_scale.model.kernels import choose_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_bf16 = setting.recipe.train.precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    try:
        kernel = choose_kernel(setting.recipe.model.attention, device, dtype)
    except ValueError as error:
        if device.type == "cuda" or setting.gpu is None:
            raise
        raise Doubt(
            f"{error}; this machine has no GPU, run the check on a node of the run"
        ) from error
    return str(kernel)


def _weights(recipe: Recipe) -> str:
    from blip_scale.data.tokenizer import load_tokenizer
    from blip_scale.inference.sizes import med_config
    from blip_scale.tasks import networks
    from blip_scale.tasks.by_name import TASKS

    tokenizer = load_tokenizer(recipe.model.text)
    config = med_config(recipe, tokenizer)
    parameters = networks.initial_parameters(recipe, config, TASKS[recipe.task].head_of(recipe))
    count = sum(parameter.numel() for parameter in parameters.values())
    return f"tokenizer of {len(tokenizer)} tokens, {count / 1e6:.1f}M parameters loaded"


def _stream(recipe: Recipe, stream: StreamRecipe) -> str:
    from blip_scale.data.reading.probe import probe_stream
    from blip_scale.data.tokenizer import MOST_UNKNOWN, load_tokenizer

    tokenizer = None
    with contextlib.suppress(OSError, ValueError):  # the check of initial weights reports it
        tokenizer = load_tokenizer(recipe.model.text)
    retry_s = min(_RETRY_S, recipe.data.retry_s)
    summary, unknown = probe_stream(stream, recipe.data.make_with, retry_s, tokenizer)
    if tokenizer is None:
        return summary
    message = f"{summary}, {unknown:.1%} of the tokens of its first captions are [UNK]"
    if unknown > MOST_UNKNOWN:
        raise Doubt(f"{message}: set model.text.tokenizer to one for this language")
    return message


def _cache(recipe: Recipe) -> str:
    """Check that the caches of remote streams are writable and have room for `cache_limit`."""
    folders = {s.local for s in [*recipe.data.streams, *recipe.data.heldout] if s.remote}
    if not folders:
        return "all streams are local"
    limit = parse_bytes(recipe.data.cache_limit) if recipe.data.cache_limit else None
    least = math.inf
    for folder in sorted(folders):
        path = Path(os.path.expandvars(folder)).expanduser()
        held = sum(file.stat().st_size for file in path.glob("*")) if path.is_dir() else 0
        least = min(least, free_bytes(path) + held)
    if limit is not None and least < limit:
        raise ValueError(
            f"data.cache_limit is {limit / _GB:.1f} GB, but only {least / _GB:.1f} GB are free: "
            "lower it, or set local of the streams to another disk"
        )
    if limit is None:
        raise Doubt(
            f"no data.cache_limit: all shards stay in the local cache ({least / _GB:.1f} GB free)"
        )
    return f"{least / _GB:.1f} GB free for {limit / _GB:.1f} GB"


def _output(setting: Setting) -> str:
    """Check that the disk has room for the kept checkpoints, and for one being written."""
    folder = Path(setting.recipe.output_dir)
    free = free_bytes(folder)
    planned = setting.plan().checkpoints_bytes
    message = (
        f"{free / _GB:.1f} GB free in {folder}, {planned / _GB:.1f} GB for "
        f"{setting.recipe.checkpoint.keep_last} checkpoints and one being written"
    )
    if free < planned:
        raise ValueError(f"{message}: set another output_dir, or a lower checkpoint.keep_last")
    return message


def _checkpoint_folder(recipe: Recipe) -> str:
    """Check that a small object can be written, read and deleted in object storage."""
    if recipe.checkpoint.folder is None:
        return "in output_dir"
    where = os.path.expandvars(recipe.checkpoint.folder).rstrip("/")
    if "://" not in where:
        return f"{free_bytes(Path(where)) / _GB:.1f} GB free in {where}"
    from blip_scale.storage.objects import ObjectFolder

    objects = ObjectFolder(where, _RETRY_S)
    name, content = f"dry_run_{uuid.uuid4().hex}", b"written by train.py --dry-run"
    objects.put(name, content)
    try:
        if objects.get(name) != content:
            raise ValueError(f"{where}: the content read differs from the content written")
    finally:
        objects.delete([name])
    return f"{where}: an object written, read back and deleted"


def _gpu_memory(setting: Setting) -> str:
    plan = setting.plan()
    if not plan.fits:
        raise ValueError(plan.memory_verdict)
    if math.isinf(plan.limit_bytes):
        need = plan.memory.total / 2**30
        raise Doubt(f"{need:.1f} GiB per GPU are planned, but no GPU is here: give --gpu NAME")
    return plan.memory_verdict


def _host_memory(setting: Setting) -> str:
    import psutil

    plan, workers = setting.plan(), setting.recipe.data.workers
    available = psutil.virtual_memory().available
    network = plan.network
    weights = 4 * sum([*network.trainable, *network.frozen])  # each rank loads all weights in fp32
    each = _PROCESS_GB * _GB * (1 + workers / 3) + weights + plan.memory.host
    need = each * setting.gpus_per_node
    message = (
        f"{need / _GB:.0f} GB for {setting.gpus_per_node} rank(s) with {workers} workers each, "
        f"{available / _GB:.0f} GB available here"
    )
    if need > available:
        raise Doubt(f"{message}: set fewer data.workers, or run the check on a node of the run")
    return message


def _shared_memory(setting: Setting) -> str:
    from blip_scale.data.loading.shared_memory import check_shared_memory, needed_bytes

    recipe = setting.recipe
    sizes = checks.batch_sizes(recipe, setting.ranks)
    images = 2 if recipe.task == "nlvr2" else 1
    size = recipe.model.vision.image_size
    needed = needed_bytes(recipe.data.workers, sizes.micro_batch, size, images)
    return check_shared_memory(needed, setting.gpus_per_node)


def _interconnect(world_size: int) -> str:
    """Check the all-reduce of a tensor over all ranks, and measure its speed."""
    if world_size == 1:
        return "one process: not measured"
    from blip_scale.engine import collectives
    from blip_scale.engine.zero.engine import start

    device = start(_EXCHANGE_TIMEOUT_S)
    seconds = collectives.time_all_reduce(_EXCHANGE_BYTES, device)
    moved = 2 * _EXCHANGE_BYTES * (world_size - 1) / world_size
    return (
        f"{world_size} ranks sum {_EXCHANGE_BYTES / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms: "
        f"{moved / seconds / _GB:.2f} GB/s a rank"
    )
