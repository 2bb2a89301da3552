"""Save, verify and restore a run: all ranks write, one atomic rename commits, the newest whole one
is used.

A checkpoint is a folder `step_00000100` with one safetensors file a rank (fp32 masters, optimizer
moments and momentum averages of its shards), `shared.safetensors` (what all ranks hold alike: the
feature queues) and `manifest.json` (sizes and checksums of the files, and the state of the run).
Until all of it is on the disk the folder is called `step_00000100.partial`. Every file says which
elements of each parameter it holds, so a checkpoint does not depend on the number of ranks or on
the ZeRO stage that wrote it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip_scale.engine import collectives
from blip_scale.engine.deepspeed import Shard, ZeroEngine
from blip_scale.engine.sharded_momentum import ShardedMomentum

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step_(\d{8})")


@dataclass
class RunState:
    """What is saved beside the weights.

    `position` and `task` go to JSON; `shared` holds tensors that are equal on all ranks.
    """

    step: int
    position: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)


def save(
    folder: Path, state: RunState, engine: ZeroEngine, momentum: ShardedMomentum
) -> Path | None:
    """Write and commit a checkpoint; every rank must call it.

    Returns:
        The committed folder, or None when a rank could not write (disk full, no rights): the reason
        is logged, the unfinished folder removed, and every earlier checkpoint is as it was.
    """
    started = time.perf_counter()
    final = folder / f"step_{state.step:08d}"
    partial = final.with_suffix(".partial")
    error = _try(lambda: _make_empty(partial)) if collectives.rank() == 0 else None
    files: dict[str, dict[str, Any]] = {}
    if not any(collectives.all_gather_objects(error)):
        error = _try(lambda: files.update(_write_rank(partial, state, engine, momentum)))
    reports = collectives.all_gather_objects((error, files))
    errors = [report[0] for report in reports if report[0]]
    if not errors and collectives.rank() == 0:
        listing = {name: entry for _, written in reports for name, entry in written.items()}
        error = _try(lambda: _commit(partial, final, state, listing))
    errors += [
        error for error in collectives.all_gather_objects(error) if error and error not in errors
    ]
    if errors:
        if collectives.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        logger.error(
            "checkpoint of step %d was NOT saved to %s: %s. Earlier checkpoints are intact.",
            state.step, folder, "; ".join(errors),
        )  # fmt: skip
        return None
    logger.info("saved %s in %.1f s", final, time.perf_counter() - started)
    return final


def prune(folder: Path, saved: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints up to `saved`; rank 0 alone does it.

    Those of later steps do not count: a run that went back behind them found them damaged.
    """
    if collectives.rank() == 0:
        for path in [path for path in _committed(folder) if path <= saved][:-keep_last]:
            shutil.rmtree(path)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files all have the size and checksum of its manifest; all ranks
    must ask.

    Each rank checks a share of the files. What is passed over is named in the log.
    """
    if collectives.rank() == 0:
        for path in sorted(folder.glob("step_*.partial")):
            logger.warning("ignoring %s: the save did not finish", path)
            shutil.rmtree(path, ignore_errors=True)
    candidates = collectives.all_gather_objects(
        [str(path) for path in reversed(_committed(folder))]
    )[0]
    for path in map(Path, candidates):
        problems = collectives.all_gather_objects(_damage(path))
        found = [problem for problem in problems if problem]
        if not found:
            return path
        logger.warning("ignoring %s: %s", path, "; ".join(found))
    return None


def load(path: Path, engine: ZeroEngine, momentum: ShardedMomentum) -> RunState:
    """Restore weights, moments and momentum averages from a whole checkpoint, for any number of
    ranks.

    Raises:
        ValueError: the checkpoint is of another network (a parameter is missing, has another size,
            or is one too many).
    """
    manifest = _manifest(path)
    reader = _Reader([path / name for name in manifest["files"] if name.startswith("rank_")])
    reader.check({name: getattr(p, "ds_numel", p.numel()) for name, p in engine.trainable.items()})
    for flat in {id(shard.flat): shard.flat for shard in engine.shards}.values():
        _make_moments(engine.optimizer, flat, manifest["optimizer_steps"])
    for shard in engine.shards:
        reader.read("weight", shard, shard.weight)
        for key in _MOMENTS:
            if manifest["optimizer_steps"]:
                reader.read(key, shard, shard.state(engine.optimizer, key))
    for shard, average in zip(momentum.shards, momentum.averages, strict=True):
        reader.read("momentum", shard, average)
    engine.refresh()
    momentum.refresh()
    shared: dict[str, Tensor] = {}
    with safe_open(path / "shared.safetensors", "pt") as file:
        shared = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return RunState(manifest["step"], manifest["position"], manifest["task"], shared)


def _committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))


def _try(action: Any) -> str | None:
    """Run a file operation; what the operating system (or safetensors) had against it, if
    anything."""
    try:
        action()
    except Exception as error:  # a rank that raised here would leave the others waiting
        return f"rank {collectives.rank()}: {type(error).__name__}: {error}"
    return None


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_rank(
    folder: Path, state: RunState, engine: ZeroEngine, momentum: ShardedMomentum
) -> dict[str, dict[str, Any]]:
    """Write this rank's file, and on rank 0 the shared one; name -> size and checksum."""
    tensors: dict[str, Tensor] = {}
    ranges: dict[str, str] = {}
    for shard in engine.shards:
        ranges[shard.name] = f"{shard.start}"
        tensors[f"weight/{shard.name}"] = shard.weight
        if engine.optimizer.state.get(shard.flat):
            for key in _MOMENTS:
                tensors[f"{key}/{shard.name}"] = shard.state(engine.optimizer, key)
    for shard, average in zip(momentum.shards, momentum.averages, strict=True):
        tensors[f"momentum/{shard.name}"] = average
    name = f"rank_{collectives.rank():05d}.safetensors"
    written = {name: _write(folder / name, tensors, ranges)}
    if collectives.rank() == 0:
        written["shared.safetensors"] = _write(folder / "shared.safetensors", state.shared, {})
        written["shared.safetensors"]["optimizer_steps"] = _optimizer_steps(engine)
    return written


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a file through to the disk and say its size and checksum."""
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path, metadata
    )
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3": _checksum(path)}


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _commit(partial: Path, final: Path, state: RunState, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest and give the folder its final name: from here on the checkpoint exists."""
    manifest = {
        "step": state.step,
        "world_size": collectives.world_size(),
        "optimizer_steps": files["shared.safetensors"].pop("optimizer_steps"),
        "position": state.position,
        "task": state.task,
        "files": files,
    }
    with (partial / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def _damage(path: Path) -> str | None:
    """What is wrong with this rank's share of the files of a checkpoint."""
    try:
        files = sorted(_manifest(path)["files"].items())
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json cannot be read ({error})"
    for name, entry in files[collectives.rank() :: collectives.world_size()]:
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or _checksum(file) != entry["xxh3"]:
            return f"{name} is damaged"
    return None


def _optimizer_steps(engine: ZeroEngine) -> int:
    """Updates that AdamW has made, for its bias correction."""
    for shard in engine.shards:
        state = engine.optimizer.state.get(shard.flat)
        if state:
            return int(state["step"])
    return 0


def _make_moments(optimizer: torch.optim.Optimizer, flat: Tensor, steps: int) -> None:
    """AdamW makes its state at the first step; a resumed run needs it before."""
    if steps == 0:
        return
    fused = isinstance(optimizer, torch.optim.AdamW)
    step = torch.tensor(float(steps), dtype=torch.float32, device=flat.device) if fused else steps
    optimizer.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in _MOMENTS}}


class _Reader:
    """Reads any stretch of any parameter out of the files of all ranks."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [safe_open(file, "pt") for file in files]
        self._starts = [
            {name: int(start) for name, start in (file.metadata() or {}).items()}
            for file in self._files
        ]

    def check(self, sizes: Mapping[str, int]) -> None:
        """Refuse files that hold other parameters, or parameters of other sizes, than these."""
        saved: dict[str, int] = {}
        for file, starts in zip(self._files, self._starts, strict=True):
            for name, start in starts.items():
                end = start + file.get_slice(f"weight/{name}").get_shape()[0]
                saved[name] = max(saved.get(name, 0), end)
        for name in [*sizes, *saved]:
            if saved.get(name, 0) != sizes.get(name, 0):
                raise ValueError(
                    f"the checkpoint holds {saved.get(name, 0)} elements of {name}, the recipe's "
                    f"network {sizes.get(name, 0)}: it is of another network. Give the recipe that "
                    "it was made with, or another output_dir."
                )

    def read(self, kind: str, shard: Shard, target: Tensor) -> None:
        """Fill `target` [numel] with elements [start, start + numel) of the flattened tensor."""
        missing = shard.numel
        for file, starts in zip(self._files, self._starts, strict=True):
            if shard.name not in starts:
                continue
            piece = file.get_slice(f"{kind}/{shard.name}")
            begin = starts[shard.name]
            low = max(shard.start, begin)
            high = min(shard.start + shard.numel, begin + piece.get_shape()[0])
            if low < high:
                target[low - shard.start : high - shard.start] = piece[low - begin : high - begin]
                missing -= high - low
        if missing:
            raise ValueError(
                f"the checkpoint lacks {missing} elements of {kind}/{shard.name}: its files were "
                "changed by hand. Take another output_dir."
            )
