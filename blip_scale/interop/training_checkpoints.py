"""Our own training checkpoints, in and out, without ranks: see blip_scale.engine for the format.

A folder `step_N`: one safetensors file a rank with stretches of flattened fp32 parameters, the
queues in shared.safetensors, and manifest.json. Folders that are written here hold no optimizer
state, so no run goes on from them: `model.checkpoint` takes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip_scale.interop.blip_weights import BlipWeights, checked
from blip_scale.interop.heads import from_published, head_of_names, shapes_of, to_published
from blip_scale.interop.salesforce import momentum_from_salesforce, momentum_to_salesforce
from blip_scale.interop.salesforce_files import at_their_resolution, med_config_from
from blip_scale.model.med import MEDConfig
from blip_scale.storage.checkpoint_format import check_vocabulary

MANIFEST = "manifest.json"
NETWORK = "network.json"
"""Sizes of the network, in folders that are written here."""
_MODEL = "med."
_SHARED = "shared.safetensors"


def step_folder(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest of a run's folder; None without."""
    for folder in (path / "checkpoints", path):
        steps = [f for f in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", f.name)]
        if steps:
            return max(steps)
    is_run = (path / "recipe.yaml").is_file()  # whose manifest.json is that of the run
    return path if (path / MANIFEST).is_file() and not is_run else None


def _network_of(folder: Path) -> MEDConfig | None:
    """The sizes, where the folder says them."""
    file = folder / NETWORK
    if not file.is_file():
        return None
    try:
        return med_config_from(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def read_training_checkpoint(
    folder: Path, config: MEDConfig | None, with_state: bool = True
) -> BlipWeights:
    """The weights of a head with their momentum copies and queues, put together parameter by
    parameter; the names of the parameters tell which head it is (`heads`).

    Args:
        folder: `step_N`.
        config: of the network, for folders that don't say it.
        with_state: read momentum copies and queues too.

    Raises:
        ValueError: damaged files, or a checkpoint of another network; names what.
        FileNotFoundError: a file of the manifest is missing.
    """
    config = _network_of(folder) or config
    if config is None:
        raise ValueError(f"{folder} doesn't say the sizes of its network; give --recipe")
    manifest = _verified(folder)
    files = [folder / name for name in sorted(manifest["files"]) if name.startswith("rank_")]
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            names = {name for file in opened for name in file.metadata() or {}}
            head = head_of_names(names, config) or "pretrain"
            shapes = shapes_of(head, config)
            sizes = {name: math.prod(shape) for name, shape in shapes.items()}
            check_vocabulary(folder, manifest["parameters"], sizes)
            found = dict(_whole(opened, "weight", shapes, folder))
            momentum = dict(_whole(opened, "momentum", shapes, folder)) if with_state else {}
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from error
    missing = sorted(set(shapes) - set(found))
    if missing:
        raise ValueError(
            f"{folder} holds another network: missing "
            + ", ".join(name.removeprefix(_MODEL) for name in missing[:5])
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    state = to_published(found, head)
    queue = load_file(folder / _SHARED) if with_state else {}
    if queue:
        still = {name: found[name] for name in manifest.get("frozen", [])}  # as their copies
        copies = {name.removeprefix(_MODEL): p for name, p in (still | momentum).items()}
        state |= momentum_to_salesforce(copies, state)
        state |= {f"{kind}_queue": queue[f"queue/{kind}"] for kind in ("image", "text")}
        pointer = torch.tensor([manifest["task"]["queue"]["pointer"]])
        state["queue_ptr" if head == "pretrain" else "ptr_queue"] = pointer
        if head == "retrieval":
            state["idx_queue"] = queue["queue/image_ids"][None]
    weights = BlipWeights(head, config, state, str(folder), manifest["step"])
    weights.config = at_their_resolution(config, state)
    return checked(weights)


def write_training_checkpoint(weights: BlipWeights, folder: Path) -> None:
    """Pretrained weights as a checkpoint of one rank, with the sizes of the network beside it.

    Raises:
        ValueError: encoder and decoder are no halves of one network.
    """
    names = shapes_of("pretrain", weights.config)
    weight = from_published(weights.state, "pretrain", names)
    momentum = momentum_from_salesforce(weights.state, weights.config)
    tensors = {f"weight/{name}": tensor for name, tensor in weight.items()}
    for name, tensor in momentum.items():  # may be the weight itself, which safetensors refuses
        shared = tensor.data_ptr() == weight[f"{_MODEL}{name}"].data_ptr()
        tensors[f"momentum/{_MODEL}{name}"] = tensor.clone() if shared else tensor
    tensors = {name: tensor.flatten().contiguous() for name, tensor in tensors.items()}
    starts = dict.fromkeys(weight, "0")
    save_file(tensors, folder / "rank_00000.safetensors", starts)
    queues, task = {}, {}
    if "image_queue" in weights.state:
        queues = {f"queue/{kind}": weights.state[f"{kind}_queue"] for kind in ("image", "text")}
        task = {"queue": {"pointer": int(weights.state["queue_ptr"]), "enqueued": 0}}
        queues["queue/entered_at"] = torch.full((queues["queue/image"].shape[1],), -1)
    save_file({key: tensor.contiguous() for key, tensor in queues.items()}, folder / _SHARED)
    manifest = {
        "step": weights.step or 0,
        "world_size": 1,
        "stage": 3,
        "optimizer_steps": 0,
        "parameters": {name: tensor.numel() for name, tensor in weight.items()},
        "position": {},
        "task": task,
        "files": {file.name: _entry(file) for file in sorted(folder.glob("*.safetensors"))},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    network = json.dumps(dataclasses.asdict(weights.config), indent=1)
    (folder / NETWORK).write_text(network, encoding="utf-8")


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest, after a look at size and checksum of every file."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST} can't be read: {error}") from error
    for name, entry in files:
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; a checkpoint is whole with the files of all ranks"
            )
        if _entry(file) != {key: entry[key] for key in ("bytes", "xxh3")}:
            raise ValueError(f"{file} is damaged: size or checksum isn't that of {MANIFEST}")
    return manifest


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, xxhash.xxh3_64)  # type: ignore[arg-type]
    return {"bytes": file.stat().st_size, "xxh3": digest.hexdigest()}


def _whole(
    files: list[Any], kind: str, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """(parameter, tensor) of each that has this kind, its stretches put together."""
    starts = [file.metadata() or {} for file in files]
    keys = [set(file.keys()) for file in files]
    for full in sorted({name for one in starts for name in one}):
        pieces = [
            (int(one[full]), file)
            for one, there, file in zip(starts, keys, files, strict=True)
            if full in one and f"{kind}/{full}" in there
        ]
        if not pieces:
            continue
        if full not in shapes:
            raise ValueError(f"{folder} holds another network: {full} is left over")
        parts: list[Tensor] = []
        read = 0
        for start, file in sorted(pieces, key=lambda piece: piece[0]):
            stretch = file.get_tensor(f"{kind}/{full}")
            if start != read:
                raise ValueError(f"{folder}: elements of {kind}/{full} are missing at {start}")
            parts.append(stretch)
            read += len(stretch)
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        shape = shapes[full]
        if full == f"{_MODEL}vision.pos_embed":  # any resolution
            shape = (1, len(tensor) // shape[-1], shape[-1])
        if len(tensor) != torch.Size(shape).numel():
            raise ValueError(
                f"{folder} holds another network: {len(tensor)} elements of "
                f"{full.removeprefix(_MODEL)}, wanted {tuple(shape)}"
            )
        yield full, tensor.view(shape)
