"""`train.py --dry-run`: look, before a long wait in a queue, for what usually makes a run fail.

On one process (a login node, no GPU needed) or started on allocated nodes as a run would be. Every
check says ok, warning or FAILED with the mend, and the next one follows, so that all problems are
seen at once.
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
"""Exit code when a check failed."""
_RETRY_S = 20.0
_EXCHANGE_BYTES = 64 * 2**20
_EXCHANGE_TIMEOUT_S = 300.0  # ranks that don't find each other by then never will
_GB = 1e9
_PROCESS_GB = 3.0
"""Host memory of a rank besides weights: Python, torch, pinned batches; and of a loader worker a
third of it. A rule of thumb."""

_LEVELS = ("ok", "warning", "FAILED")


class Doubt(Exception):
    """Not sure to fail: a warning."""


@dataclass(frozen=True)
class Finding:
    """What a check said."""

    name: str
    level: int
    """Index into ok, warning, FAILED."""
    message: str


@dataclass(frozen=True)
class Setting:
    """What the checks look at."""

    recipe: Recipe
    ds_config: Path
    ranks: int
    gpus_per_node: int
    gpu: GPU | None
    """The one that was named; None: the one that is here."""

    def plan(self) -> Plan:
        """The plan for these ranks, on the GPU that was named or is here."""
        from blip_scale.planning.assumptions import Assumptions
        from blip_scale.planning.plan import make_plan
        from blip_scale.planning.timing import Cluster
        from blip_scale.tasks.by_name import contrast_of

        nodes = self.ranks // self.gpus_per_node
        cluster = Cluster(nodes, self.gpus_per_node, self._gpu())
        # A stream that is not there has a line of its own; memory and disk do not depend on it.
        assumed = Assumptions(unknown_samples=10**6)
        try:
            config = checks.resolve_deepspeed(self.recipe, self.ds_config, self.ranks)
            return make_plan(self.recipe, config, cluster, contrast_of, assumed)
        except (ValueError, FileNotFoundError) as error:  # another check has failed of it
            raise Doubt(f"cannot be planned: {error}") from error

    def _gpu(self) -> GPU:
        import torch

        from blip_scale.planning.assumptions import GIB
        from blip_scale.planning.hardware import GPUS

        if self.gpu is not None:
            return self.gpu
        if torch.cuda.is_available():
            there = torch.cuda.get_device_properties(0).total_memory / GIB
            return dataclasses.replace(GPUS["h100"], memory_gib=there)
        return dataclasses.replace(GPUS["h100"], memory_gib=math.inf)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a dry run."""
    add = parser.add_argument
    add(
        "--dry-run",
        action="store_true",
        help="check what usually makes a run fail; nothing is trained",
    )
    add(
        "--ranks",
        type=int,
        help="for --dry-run: number of ranks of the run (default: the launcher's, or 1)",
    )
    add(
        "--gpus-per-node",
        type=int,
        help="for --dry-run: ranks of a node (default: the launcher's, or 8)",
    )
    add("--gpu", help="for --dry-run: h100, a100-80, ... (default: the GPU of this machine)")


def run(recipe: Recipe, options: argparse.Namespace) -> int:
    """Make all checks; returns 0, or 2 when one failed. Every rank of a launch must call it.

    Raises:
        ValueError: --gpu names no GPU, or several.
    """
    gpu = find_gpu(options.gpu) if options.gpu else None
    # Imported here, so that a refusal does not wait for torch.
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
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # the node's disks and network, once
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
    """What one process of a node looks at."""
    recipe = setting.recipe
    found: list[tuple[str, Callable[[], str]]] = [
        ("settings", lambda: _settings(setting)),
        ("batch", lambda: _batch(setting)),
        ("DeepSpeed", lambda: _deepspeed(setting)),
        ("attention", lambda: _attention(setting)),
        ("initial weights", lambda: _weights(recipe)),
    ]
    for stream in [*recipe.data.streams, *recipe.data.heldout]:
        found.append((f"stream {stream.name}", partial(_stream, recipe, stream)))
    return [
        *found,
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
    except Exception as error:  # each library has its own; none may hide the checks that follow
        logger.debug("%s", name, exc_info=True)
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return Finding(name, 2, " ".join(f"{kind}{error}".split()))


def _report(everyone: list[list[Finding]], setting: Setting) -> None:
    """One line a check; ranks that found something are named."""
    names = dict.fromkeys(finding.name for part in everyone for finding in part)
    failed = 0
    for name in names:
        said = [
            (rank, finding)
            for rank, part in enumerate(everyone)
            for finding in part
            if finding.name == name
        ]
        worst = max(finding.level for _, finding in said)
        failed += worst == 2
        rank, finding = next(one for one in said if one[1].level == worst)
        who = f" (rank {rank})" if worst and len(everyone) > 1 else ""
        logger.info("%-8s%s%s: %s", _LEVELS[worst], name, who, finding.message)
    state = f"{failed} of {len(names)} checks failed" if failed else "ready"
    logger.info("dry run for %d rank(s), %d a node: %s", setting.ranks, setting.gpus_per_node,
                state)  # fmt: skip


def _launcher(setting: Setting) -> str:
    """The variables of ranks fit each other, and there is a device for this rank."""
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
            "GPUs: start as many ranks as GPUs"
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
    """The kernel that a task asks for when a run starts."""
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
        raise Doubt(f"{error}; look on a node of the run, no GPU is here") from error
    return str(kernel)


def _weights(recipe: Recipe) -> str:
    from blip_scale.data.tokenizer import load_tokenizer
    from blip_scale.inference.sizes import med_config
    from blip_scale.tasks import networks
    from blip_scale.tasks.by_name import TASKS

    tokenizer = load_tokenizer(recipe.model.text)
    config = med_config(recipe, tokenizer)
    parameters = networks.initial_parameters(recipe, config, TASKS[recipe.task].head)
    count = sum(parameter.numel() for parameter in parameters.values())
    return f"tokenizer of {len(tokenizer)} tokens, {count / 1e6:.1f}M parameters loaded"


def _stream(recipe: Recipe, stream: StreamRecipe) -> str:
    from blip_scale.data.reading.probe import MOST_UNKNOWN, probe_stream
    from blip_scale.data.tokenizer import load_tokenizer

    tokenizer = None
    with contextlib.suppress(OSError, ValueError):  # the check of initial weights names it
        tokenizer = load_tokenizer(recipe.model.text)
    retry_s = min(_RETRY_S, recipe.data.retry_s)
    found, unknown = probe_stream(stream, recipe.data.make_with, retry_s, tokenizer)
    if tokenizer is None:
        return found
    message = f"{found}, {unknown:.1%} of the tokens of its first captions are [UNK]"
    if unknown > MOST_UNKNOWN:
        raise Doubt(f"{message}: set model.text.tokenizer to one that knows this text")
    return message


def _cache(recipe: Recipe) -> str:
    """Folders that remote streams are fetched into: writable, with room for `cache_limit`."""
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
            f"data.cache_limit is {limit / _GB:.1f} GB, but {least / _GB:.1f} GB are free: lower "
            "it, or give streams another local"
        )
    if limit is None:
        raise Doubt(
            f"no data.cache_limit: everything that is read stays on the disk ({least / _GB:.1f} GB "
            "free)"
        )
    return f"{least / _GB:.1f} GB free for {limit / _GB:.1f} GB"


def _output(setting: Setting) -> str:
    """Room for the checkpoints that are kept and one that is being written."""
    folder = Path(setting.recipe.output_dir)
    free = free_bytes(folder)
    planned = setting.plan().checkpoints_bytes
    said = (
        f"{free / _GB:.1f} GB free in {folder}, {planned / _GB:.1f} GB for "
        f"{setting.recipe.checkpoint.keep_last} checkpoints and one being written"
    )
    if free < planned:
        raise ValueError(f"{said}: give another output_dir, or fewer checkpoint.keep_last")
    return said


def _checkpoint_folder(recipe: Recipe) -> str:
    """Object storage takes, gives back and deletes a small object."""
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
            raise ValueError(f"{where}: what was written came back different")
    finally:
        objects.delete([name])
    return f"{where}: an object written, read back and deleted"


def _gpu_memory(setting: Setting) -> str:
    plan = setting.plan()
    if not plan.fits:
        raise ValueError(plan.memory_verdict)
    if math.isinf(plan.limit_bytes):
        need = plan.memory.total / 2**30
        raise Doubt(f"{need:.1f} GiB a GPU are planned, and none is here: give --gpu NAME")
    return plan.memory_verdict


def _host_memory(setting: Setting) -> str:
    import psutil

    plan, workers = setting.plan(), setting.recipe.data.workers
    there = psutil.virtual_memory().available
    network = plan.network
    weights = 4 * sum([*network.trainable, *network.frozen])  # each rank loads them whole, once
    each = _PROCESS_GB * _GB * (1 + workers / 3) + weights + plan.memory.host
    need = each * setting.gpus_per_node
    said = (
        f"{need / _GB:.0f} GB for {setting.gpus_per_node} rank(s) with {workers} workers each, "
        f"{there / _GB:.0f} GB available here"
    )
    if need > there:
        raise Doubt(f"{said}: give fewer data.workers, or look on a node of the run")
    return said


def _shared_memory(setting: Setting) -> str:
    from blip_scale.data.loading.shared_memory import check_shared_memory, needed_bytes

    recipe = setting.recipe
    sizes = checks.batch_sizes(recipe, setting.ranks)
    images = 2 if recipe.task == "nlvr2" else 1
    size = recipe.model.vision.image_size
    needed = needed_bytes(recipe.data.workers, sizes.micro_batch, size, images)
    return check_shared_memory(needed, setting.gpus_per_node)


def _interconnect(world_size: int) -> str:
    """A sum over all ranks is right, and how fast it is."""
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
