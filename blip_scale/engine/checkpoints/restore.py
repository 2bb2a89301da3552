"""Restoring: find the newest complete checkpoint, and load it on any number of ranks.

If the run has object storage, files that are missing or damaged locally are fetched from it. For
example, the disk of a replaced node is empty.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_scale.engine import collectives
from blip_scale.engine.checkpoints.background import Outcome, attempt, errors_of
from blip_scale.engine.checkpoints.location import Place
from blip_scale.engine.checkpoints.save import RunState
from blip_scale.engine.zero.engine import ZeroEngine
from blip_scale.engine.zero.momentum import ShardedMomentum
from blip_scale.storage import checkpoint_format, run_folder
from blip_scale.storage.checkpoint_format import Manifest, UnknownVersionError
from blip_scale.storage.objects import DamagedFile

logger = logging.getLogger(__name__)


def newest_whole(place: Place, stage: int) -> Path | None:
    """The newest checkpoint whose files all match its manifest in size and checksum.

    Call it on all ranks. Each rank checks a share of the files and fetches missing ones. Rejected
    checkpoints are named in the log.

    Args:
        place: location of the checkpoints.
        stage: ZeRO stage of this run. Ranks that share no disk need the files of all ranks only if
            the number of ranks or the stage has changed.

    Returns:
        Its folder, with all files that the ranks that see it need; None if there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, but none is whole; or the newest has another version of
            the format.
        OSError: there is no local checkpoint, and the object storage doesn't answer. It is a
            FileNotFoundError if retrying is pointless.
    """
    if place.is_first:
        for path in sorted(place.folder.glob("step_*.partial")):
            logger.warning("ignoring %s: the save did not finish", path)
            with contextlib.suppress(OSError):
                checkpoint_format.remove(path)
    here = checkpoint_format.committed(place.folder) if place.is_first else []
    everywhere = collectives.all_gather_objects(here)
    local = {step for steps in everywhere for step in steps}
    remote = set(_remote_steps(place, bool(local)))
    for step in sorted(local | remote, reverse=True):
        for manifest in _manifests(place, step, step in remote):
            problem = _make_whole(place, step, stage, manifest)
            if problem is None:
                return place.folder / run_folder.step_folder(step)
            logger.warning("ignoring %s: %s", place.folder / run_folder.step_folder(step), problem)
    if local | remote:
        where = f"{place.folder}" + (f" and {place.remote.url}" if place.remote else "")
        raise ValueError(
            f"none of the {len(local | remote)} checkpoints in {where} is complete (the log gives "
            "the reasons). Restore one, or move them away to start a new run."
        )
    return None


def load(path: Path, engine: ZeroEngine, momentum: ShardedMomentum) -> RunState:
    """Restore weights, moments and momentum averages from a whole checkpoint, on any ranks.

    Raises:
        ValueError: the checkpoint's network has other parameters or sizes, other layers of it were
            frozen, or it lacks momentum averages that this run needs.
    """
    manifest = checkpoint_format.read_manifest(path)
    _check_network(path, manifest, engine)
    names = _needed(manifest, engine.stage, (collectives.rank(),))
    rank_files = [path / name for name in names if name != checkpoint_format.SHARED]
    reader = checkpoint_format.Reader(rank_files)
    absent = {piece.name for piece in momentum.slices} - reader.names("momentum")
    if absent:
        raise ValueError(
            f"{path} holds no momentum averages of {min(absent)} and {len(absent) - 1} more "
            "parameters: it was trained with another objective.itc. Set objective.itc to that, or "
            "start a new run from it with model.checkpoint and another output_dir."
        )
    trained = [piece for piece in engine.slices if piece.trains]
    for flat in {id(piece.flat): piece.flat for piece in trained}.values():
        _make_moments(engine.optimizer, flat, manifest.optimizer_steps)
    for piece in engine.slices:
        reader.read("weight", piece.name, piece.start, piece.weight)
        for key in checkpoint_format.MOMENTS:
            if piece.trains and manifest.optimizer_steps:
                moment = piece.state(engine.optimizer, key)
                reader.read(key, piece.name, piece.start, moment)
    for piece, average in zip(momentum.slices, momentum.averages, strict=True):
        reader.read("momentum", piece.name, piece.start, average)
    engine.refresh()
    momentum.refresh()
    shared = checkpoint_format.read_tensors(path / checkpoint_format.SHARED)
    return RunState(manifest.step, manifest.position, manifest.task, shared)


def _remote_steps(place: Place, may_fail: bool) -> list[int]:
    """Steps of committed checkpoints in the object storage, as rank 0 sees them.

    Raises:
        OSError: the storage doesn't answer, and `may_fail` is False.
    """
    steps: list[int] | OSError = []
    if place.remote and place.rank == 0:
        try:
            steps = checkpoint_format.committed_objects(place.remote.sizes())
        except OSError as error:
            steps = error
    steps = collectives.all_gather_objects(steps)[0]
    if isinstance(steps, OSError):
        if not may_fail:
            raise steps
        logger.warning("%s; using only %s", steps, place.folder)
        return []
    return steps


def _manifests(place: Place, step: int, is_remote: bool) -> list[str]:
    """Distinct manifests of a step: those of the nodes, then that of the object storage.

    A manifest that can't be read is empty.
    """
    here: list[str] = []
    file = place.folder / run_folder.step_folder(step) / checkpoint_format.MANIFEST
    if place.is_first and file.parent.exists():
        here = [_text(file)]
    if place.remote and is_remote and place.rank == 0:
        try:
            content = place.remote.get(f"{file.parent.name}/{file.name}")
            here.append(content.decode(errors="replace"))
        except OSError as error:
            logger.warning("%s", error)
    parts = collectives.all_gather_objects(here)
    firsts = [part[0] for part in parts if part]
    lasts = [part[-1] for part in parts if part]
    return list(dict.fromkeys([*firsts, *lasts]))


def _text(file: Path) -> str:
    """Content of a manifest; empty if there is none or it can't be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        logger.warning("%s can't be read: %s", file, error)
        return ""


def _make_whole(place: Place, step: int, stage: int, text: str) -> str | None:
    """Bring all files of a manifest to the ranks that need them. Returns problems, or None."""
    try:
        manifest = Manifest.from_json(text)
    except UnknownVersionError as error:  # it may be complete: do not fall back to an older one
        raise UnknownVersionError(
            f"{place.folder / run_folder.step_folder(step)}: {error}"
        ) from error
    except ValueError as error:
        return f"{checkpoint_format.MANIFEST} cannot be read ({error})"
    final = place.folder / run_folder.step_folder(step)
    if manifest.step != step:
        return f"{checkpoint_format.MANIFEST} is that of step {manifest.step}"
    ranks = range(len(manifest.files) - 1)
    expected = {checkpoint_format.SHARED, *map(checkpoint_format.rank_file, ranks)}
    if manifest.world_size != len(ranks) or manifest.files.keys() != expected:
        return (
            f"{checkpoint_format.MANIFEST} names files that {manifest.world_size} ranks don't make"
        )
    needed = _needed(manifest, stage, place.sharers)
    is_same = _text(final / checkpoint_format.MANIFEST) == text
    folder = final if is_same else final.with_suffix(".partial")
    problem = None
    for name in place.share(needed):
        problem = problem or _obtain(place, folder / name, manifest.files[name])
    problems = [reason for reason in collectives.all_gather_objects(problem) if reason]
    outcome = Outcome()
    if place.is_first and not is_same:
        if problems:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            outcome = attempt(lambda: checkpoint_format.commit(folder, final, text), place.rank)
    problems += errors_of(collectives.all_gather_objects(outcome))
    return "; ".join(dict.fromkeys(problems)) or None


def _obtain(place: Place, path: Path, entry: dict[str, Any]) -> str | None:
    """Check a local file, or fetch it from the object storage. Returns a problem, or None."""
    problem = "is missing"
    try:
        if path.exists():
            if checkpoint_format.is_intact(path, entry):
                return None
            problem = "is damaged"
        if place.remote is None:
            return f"{path.name} {problem}"
        logger.info("%s %s here: fetching it from %s", path, problem, place.remote.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        place.remote.fetch(f"{path.parent.stem}/{path.name}", path, entry["bytes"])
        if not checkpoint_format.is_intact(path, entry):
            return f"{path.name} is damaged in {place.remote.url}"
    except DamagedFile as error:
        return f"{path.name} is damaged in the object storage ({error})"
    except OSError as error:
        return f"{path.name} {problem} ({error})"
    return None


def _needed(manifest: Manifest, stage: int, ranks: tuple[int, ...]) -> list[str]:
    """Names of the files that hold the slices of some ranks.

    If neither the number of ranks nor the stage has changed, a rank's slices are all in its file.
    """
    names = sorted(manifest.files)
    if (manifest.world_size, manifest.stage) != (collectives.world_size(), stage):
        return names
    return [*(checkpoint_format.rank_file(rank) for rank in ranks), checkpoint_format.SHARED]


def _check_network(folder: Path, manifest: Manifest, engine: ZeroEngine) -> None:
    """Refuse a checkpoint whose parameters, sizes or frozen layers differ from the engine's.

    Raises:
        ValueError: names a parameter that differs.
    """
    saved, parameters = manifest.parameters, engine.trainable | engine.frozen
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in parameters.items()}
    checkpoint_format.check_vocabulary(folder, saved, sizes)
    for name in [*sizes, *saved]:
        if saved.get(name, 0) != sizes.get(name, 0):
            raise ValueError(
                f"{folder} holds {saved.get(name, 0)} elements of {name}, the recipe's "
                f"network {sizes.get(name, 0)}: it is of another network. Give the recipe that "
                "it was made with, or another output_dir."
            )
    differing = sorted(set(manifest.frozen) ^ set(engine.frozen))
    if differing:
        raise ValueError(
            f"{folder} was made with other frozen layers ({differing[0]} and "
            f"{len(differing) - 1} more parameters): give the "
            "model.vision.frozen_layers that it was made with, and the same model.vision.frozen, "
            "model.text.frozen and model.lora.also_train, or begin a run from it with "
            "model.checkpoint and another output_dir."
        )


def _make_moments(optimizer: torch.optim.Optimizer, flat: Tensor, updates: int) -> None:
    """Make AdamW's state, which a resumed run needs before the first update."""
    if updates == 0:
        return
    fused = isinstance(optimizer, torch.optim.AdamW)
    step = torch.tensor(float(updates), dtype=torch.float32, device=flat.device)
    moments = {key: torch.zeros_like(flat) for key in checkpoint_format.MOMENTS}
    optimizer.state[flat] = {"step": step if fused else updates, **moments}
