"""Reader and writer of training checkpoints (`storage.checkpoint_format`) in a single process.

Checkpoints written here have no optimizer state, so no run can resume from them. Use them as
`model.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from blip_scale.interop import output_settings
from blip_scale.interop.blip_weights import BlipWeights, checked, parameters_of
from blip_scale.interop.heads import (
    MOMENTUM_PREFIX,
    PREFIX,
    head_of_names,
    is_published,
    shapes_of,
    to_published,
)
from blip_scale.interop.salesforce import (
    State,
    momentum_from_salesforce,
    momentum_to_salesforce,
)
from blip_scale.interop.salesforce_files import at_their_resolution, med_config_from
from blip_scale.model import adapters
from blip_scale.model.adapters import Adapters
from blip_scale.model.heads import Head
from blip_scale.model.med import MEDConfig
from blip_scale.model.towers import RELATIVE_TABLE
from blip_scale.storage import checkpoint_format, run_folder
from blip_scale.storage.checkpoint_format import NETWORK, Content, Manifest, Reader
from blip_scale.storage.untrusted import parse_json

_NO_IMAGE = -100
"""Image id of an unused column of a queue, as published."""
_OUTPUT = f"{output_settings.KEY}.json"
"""File of the output settings in converted checkpoints, which have no run folder."""


def step_folder(path: Path) -> Path | None:
    """Find the folder of a checkpoint: the path itself, or the newest checkpoint of a run folder.

    The result is None if the path is neither.
    """
    for folder in (path / run_folder.CHECKPOINTS, path):
        steps = checkpoint_format.committed(folder)
        if steps:
            return folder / run_folder.step_folder(steps[-1])
    is_run = (path / run_folder.RECIPE).is_file()  # its manifest.json describes the run
    has_manifest = (path / checkpoint_format.MANIFEST).is_file()
    return path if has_manifest and not is_run else None


def network_of(folder: Path) -> MEDConfig | None:
    """Read the sizes of the network, or return None if the folder does not have them."""
    file = folder / NETWORK
    if not file.is_file():
        return None
    try:
        return med_config_from(parse_json(file.read_bytes()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _output_of(folder: Path) -> output_settings.OutputSettings | None:
    """Read the output settings, or return None if the folder does not have them."""
    file = folder / _OUTPUT
    if not file.is_file():
        return None
    try:
        return output_settings.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def read_training_checkpoint(
    folder: Path, config: MEDConfig | None, with_state: bool = True
) -> BlipWeights:
    """Read the weights of a head, with momentum copies and queues.

    The names of the parameters determine the head (`heads`). Parameters that the published network
    lacks are stored in `BlipWeights.unpublished`. LoRA adapters are merged into their weights.

    Args:
        folder: checkpoint folder `step_N`.
        config: sizes of the network, for folders that do not have them.
        with_state: whether to read momentum copies and queues as well.

    Raises:
        ValueError: files are damaged, or belong to another network. The message names them.
        FileNotFoundError: a file named in the manifest is missing.
    """
    config = network_of(folder) or config
    if config is None:
        raise ValueError(f"{folder} does not state the sizes of its network; give --recipe")
    manifest = checkpoint_format.read_manifest(folder)
    checkpoint_format.verify(folder, manifest)
    names = {adapters.plain_name(name) for name in manifest.parameters}
    head = head_of_names(names, config) or "pretrain"
    shapes = shapes_of(head, config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    checkpoint_format.check_vocabulary(folder, manifest.parameters, sizes)
    _check_names(names, shapes, head, folder)
    lora = _adapters_of(manifest, folder)
    for name in manifest.parameters:
        base = shapes.get(adapters.plain_name(name))
        if lora is not None and base is not None:
            is_adapter = adapters.is_adapter(name)
            shape = adapters.adapter_shape(name, lora.rank, base) if is_adapter else base
            shapes[name] = torch.Size(shape)
    try:
        rank_files = [name for name in sorted(manifest.files) if name.startswith("rank_")]
        reader = Reader(folder / name for name in rank_files)
        parameters = _read(reader, "weight", manifest.parameters, shapes, folder)
        averaged = {name: manifest.parameters[name] for name in reader.names("momentum")}
        momentum = _read(reader, "momentum", averaged, shapes, folder) if with_state else {}
        file = folder / checkpoint_format.SHARED
        shared = checkpoint_format.read_tensors(file) if with_state else {}
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from error
    # The momentum copies of frozen parameters equal these parameters and are not stored.
    frozen = manifest.frozen if with_state else []
    copies = {name: parameters[name] for name in frozen} | momentum
    if lora is not None:
        parameters = adapters.merged(parameters, lora.scale)
        copies = adapters.merged(copies, lora.scale)
    state = to_published(parameters, head)
    unpublished = {name: t for name, t in parameters.items() if not is_published(name, head)}
    for name in map(adapters.plain_name, momentum):
        if not is_published(name, head):
            unpublished[MOMENTUM_PREFIX + name.removeprefix(PREFIX)] = copies[name]
    if shared:
        copies = {name.removeprefix(PREFIX): tensor for name, tensor in copies.items()}
        state |= momentum_to_salesforce(copies, state)
        state |= {f"{kind}_queue": shared[f"queue/{kind}"] for kind in ("image", "text")}
        pointer = torch.tensor([manifest.task["queue"]["pointer"]])
        state["queue_ptr" if head == "pretrain" else "ptr_queue"] = pointer
        if head == "retrieval":
            columns = state["image_queue"].shape[1]  # pretraining without LM stores no image ids
            ids = shared.get("queue/image_ids", torch.full((columns,), _NO_IMAGE))
            state["idx_queue"] = ids[None]
    weights = BlipWeights(
        head,
        config,
        state,
        str(folder),
        manifest.step,
        notes=[] if lora is None else [f"LoRA adapters of rank {lora.rank} are merged"],
        unpublished=unpublished,
        output=_output_of(folder),
    )
    weights.config = at_their_resolution(config, state)
    return checked(weights)


def _adapters_of(manifest: Manifest, folder: Path) -> Adapters | None:
    """Read rank and scale of a checkpoint's LoRA adapters, or return None if it has none.

    Raises:
        ValueError: the manifest does not give them, or an adapter is incomplete.
    """
    names = manifest.parameters.keys()
    if not any(map(adapters.is_adapter, names)):
        return None
    lora: Any = manifest.task.get(adapters.KEY)
    try:
        if adapters.are_complete(names):
            return Adapters(int(lora["rank"]), float(lora["alpha"]), tuple(lora["targets"]))
    except (TypeError, KeyError, ValueError):
        pass
    raise ValueError(
        f"{folder} has LoRA adapters, but lacks parts of them, their rank or their alpha: it is "
        "damaged; take another checkpoint"
    )


def write_training_checkpoint(weights: BlipWeights, folder: Path) -> None:
    """Write weights as a checkpoint of one rank, with sizes and output settings of the network.

    Parameters that the published network lacks are included.

    Raises:
        ValueError: encoder and decoder do not belong to one network.
    """
    weight = parameters_of(weights)
    copies = momentum_from_salesforce(weights.state, weights.config)
    momentum = {f"{PREFIX}{name}": tensor for name, tensor in copies.items()}
    for name, tensor in weights.unpublished.items():
        if name.startswith(MOMENTUM_PREFIX):
            momentum[PREFIX + name.removeprefix(MOMENTUM_PREFIX)] = tensor
        else:
            weight[name] = tensor
    tensors = {f"weight/{name}": tensor.flatten().contiguous() for name, tensor in weight.items()}
    for name, tensor in momentum.items():  # clone: safetensors refuses tensors that share memory
        shared = tensor.data_ptr() == weight[name].data_ptr()
        tensors[f"momentum/{name}"] = (tensor.clone() if shared else tensor).flatten().contiguous()
    queues, task = {}, {}
    if "image_queue" in weights.state:
        queues = {f"queue/{kind}": weights.state[f"{kind}_queue"] for kind in ("image", "text")}
        task = {"queue": {"pointer": int(weights.state["queue_ptr"]), "enqueued": 0}}
        queues["queue/entered_at"] = torch.full((queues["queue/image"].shape[1],), -1)
    contents = {
        checkpoint_format.rank_file(0): Content(tensors, dict.fromkeys(weight, "0")),
        checkpoint_format.SHARED: Content({key: t.contiguous() for key, t in queues.items()}, {}),
    }
    manifest = Manifest(
        step=weights.step or 0,
        world_size=1,
        stage=3,
        optimizer_steps=0,
        parameters={name: tensor.numel() for name, tensor in weight.items()},
        files=checkpoint_format.write(folder, contents),
        position={},
        task=task,
    )
    checkpoint_format.write_manifest(folder, manifest.to_json())
    network = json.dumps(dataclasses.asdict(weights.config), indent=1)
    (folder / NETWORK).write_text(network, encoding="utf-8")
    settings = json.dumps(dataclasses.asdict(weights.output_settings), indent=1)
    (folder / _OUTPUT).write_text(settings, encoding="utf-8")


def _check_names(
    saved: Iterable[str], shapes: Mapping[str, tuple[int, ...]], head: Head, folder: Path
) -> None:
    """Refuse a checkpoint with unknown or missing parameters.

    Parameters that the published network lacks may be missing. Additional parameters of losses are
    allowed.
    """
    saved = set(saved)
    unknown = sorted(name for name in saved - set(shapes) if name.startswith(PREFIX))
    if unknown:
        raise ValueError(f"{folder} holds another network: {unknown[0]} is unexpected")
    missing = sorted(name for name in set(shapes) - saved if is_published(name, head))
    if missing:
        raise ValueError(
            f"{folder} holds another network: missing "
            + ", ".join(name.removeprefix(PREFIX) for name in missing[:5])
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )


def _read(
    reader: Reader,
    kind: str,
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> State:
    """Read whole parameters by name. Parameters of losses, which `shapes` lacks, stay flat.

    Raises:
        ValueError: the size of a parameter differs from the network's.
    """
    state: State = {}
    for name, size in sizes.items():
        shape = shapes.get(name, (size,))
        if name == f"{PREFIX}vision.pos_embed":  # may have any resolution
            shape = (1, size // shape[-1], shape[-1])
        elif name.startswith(f"{PREFIX}vision.") and name.endswith(RELATIVE_TABLE):
            shape = (size // shape[-1], shape[-1])
        if size != torch.Size(shape).numel():
            raise ValueError(
                f"{folder} holds another network: {size} elements of "
                f"{name.removeprefix(PREFIX)}, wanted {tuple(shape)}"
            )
        state[name] = reader.whole(kind, name, size).view(shape)
    return state
