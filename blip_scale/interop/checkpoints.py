"""Reader of BLIP checkpoints of any format, and functions that load them into networks."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch

from blip_scale.interop import huggingface, salesforce_files
from blip_scale.interop.blip_weights import BlipWeights, parameters_of, turned_into
from blip_scale.interop.heads import MOMENTUM_PREFIX, PREFIX
from blip_scale.interop.huggingface import read_huggingface
from blip_scale.interop.salesforce import State
from blip_scale.interop.salesforce_files import read_salesforce
from blip_scale.interop.training_checkpoints import (
    network_of,
    read_training_checkpoint,
    step_folder,
)
from blip_scale.interop.vision import fitted_positions
from blip_scale.model.heads import OWN_NETWORKS, Head, build_network
from blip_scale.model.initialization import INIT_STD, fill_from_med, seeded
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.vision import build_vision
from blip_scale.storage import run_folder

log = logging.getLogger(__name__)

_STARTS: dict[Head, tuple[Head, ...]] = {
    "vqa": ("pretrain",),
    "nlvr2": ("pretrain", "retrieval"),
    "visdial": ("pretrain", "retrieval"),
}
"""Head with a separate network -> heads whose checkpoints it can start from."""

Format = Literal["ours", "salesforce", "hf"]


def format_of(path: Path) -> Format:
    """Detect the format of a checkpoint.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path is a folder of no known format.
    """
    if not path.exists():
        hint = ""
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not path.parent.exists():
            hint = (
                "; a repository of the Hugging Face hub is downloaded first: hf download "
                f"{path} --local-dir {path.name}, then give {path.name}"
            )
        raise FileNotFoundError(f"{path}: no such file or folder{hint}")
    if path.is_file():
        return "salesforce"
    if step_folder(path):
        return "ours"
    if any((path / sub / "config.json").is_file() for sub in ("", "captioning")):
        return "hf"
    if (path / run_folder.RECIPE).is_file():
        raise ValueError(f"{path} is the folder of a run that has not saved a checkpoint yet")
    raise ValueError(
        f"{path} is not a checkpoint: expected a training checkpoint (step_N with manifest.json, "
        "or the folder of a run), a .pth file, or a Hugging Face folder (config.json)"
    )


def read_checkpoint(
    path: Path, config: MEDConfig | None = None, with_state: bool = True
) -> BlipWeights:
    """Read the weights in a checkpoint of any format.

    Args:
        path: `step_N`, a run's folder (for its newest checkpoint), a `.pth` file, or a Hugging Face
            folder.
        config: sizes of the network, for checkpoints that do not state them. If a checkpoint states
            them, all but the image size must agree.
        with_state: whether to read momentum copies and queues of a training checkpoint as well.

    Raises:
        FileNotFoundError: the path does not exist, or a part of the checkpoint is missing.
        ValueError: the checkpoint is not BLIP, damaged, unsafe, or of another network. The message
            says which.
    """
    kind = format_of(path)
    if kind == "ours":
        folder = step_folder(path)
        assert folder is not None
        weights = read_training_checkpoint(folder, config, with_state)
    elif kind == "salesforce":
        weights = read_salesforce(path, config)
    else:
        weights = read_huggingface(path)
    if config is not None:
        differing = differences(weights.config, config)
        if differing:
            other = [f"{name} {saved}, not {wanted}" for name, (saved, wanted) in differing.items()]
            fix = (
                "; set model.text.tokenizer, or --tokenizer of a command, to the tokenizer of the "
                "checkpoint"
            )
            hint = fix if "vocabulary" in differing else ""
            raise ValueError(
                f"{path} has another network than the recipe: {'; '.join(other)}{hint}"
            )
    return weights


def load_checkpoint(med: MED, path: Path) -> None:
    """Load a MED that is not partitioned. Position embeddings are interpolated if necessary.

    Raises:
        FileNotFoundError, ValueError: see `head_parameters`.
    """
    state = head_parameters(path, "pretrain", med.config)
    with torch.no_grad():
        for name, parameter in med.named_parameters():
            parameter.copy_(state[f"med.{name}"])


def head_parameters(
    path: Path,
    head: Head,
    config: MEDConfig,
    seed: int = 0,
    text_std: float = INIT_STD,
    frozen: Collection[str] = (),
) -> State:
    """Read the parameters of a head's network from a checkpoint.

    The checkpoint must be of the same head, or of one from which the head can start. Heads with a
    separate network start from pretraining; those without a decoder also start from retrieval.
    Missing parameters are random. Position embeddings are interpolated to the network's resolution.
    Parameters of losses, which only training checkpoints have, are included.

    Args:
        path: see `read_checkpoint`.
        head: head of the network.
        config: sizes of the network.
        seed: seed of the random parameters.
        text_std: standard deviation of random linear layers of the text stacks.
        frozen: see `grown`.

    Returns:
        The parameters by full name.

    Raises:
        FileNotFoundError: the path does not exist, or a part of the checkpoint is missing.
        ValueError: the checkpoint is not BLIP, damaged, unsafe, of another network, or of a head
            that cannot be converted to `head`; or a frozen parameter would be random.
    """
    weights = read_checkpoint(path, config, with_state=False)
    grows = head in OWN_NETWORKS and weights.head != head
    if not grows:
        weights = turned_into(weights, head)
    elif weights.head not in _STARTS[head]:
        raise ValueError(
            f"{path} is a {weights.head} checkpoint; {head} starts from one of: "
            f"{', '.join([*_STARTS[head], head])}"
        )
    state = parameters_of(weights, seed)
    with torch.device("meta"):
        vision = build_vision(config.vision)
    state = fitted_positions(state, vision, f"{PREFIX}vision.")
    log.info("all weights from %s%s", path, "".join(f"; {note}" for note in weights.notes))
    if grows:
        state = grown(state, head, config, seed, text_std, frozen)
    prefixes = (PREFIX, MOMENTUM_PREFIX)
    losses = {n: t for n, t in weights.unpublished.items() if not n.startswith(prefixes)}
    return state | losses


def grown(
    pretrained: State,
    head: Head,
    config: MEDConfig,
    seed: int,
    text_std: float = INIT_STD,
    frozen: Collection[str] = (),
) -> State:
    """Build the parameters of a head with a separate network from those of a whole MED.

    Parameters that MED lacks are drawn from `seed`. The log names their modules.

    Args:
        pretrained: parameters of the MED by name, with or without the prefix `med.`.
        head: head of the network.
        config: sizes of the network.
        seed: seed of the random parameters.
        text_std: standard deviation of random linear layers of the text stacks.
        frozen: full plain names of the frozen parameters.

    Raises:
        ValueError: a frozen parameter would be random. The message names the modules.
    """
    network = seeded(lambda: build_network(head, config), seed)
    drawn = fill_from_med(network, pretrained, seed, text_std)
    stuck = [name for name in drawn if f"{PREFIX}{name}" in frozen]
    if stuck:
        raise ValueError(
            f"model: {_modules(stuck)} would stay at random values, as pretraining lacks them and "
            "they are frozen; set model.lora.also_train to heads or model.text.frozen to false, "
            f"or give a checkpoint of {head}"
        )
    if drawn:
        log.info("randomly initialised, not from pretraining: %s", _modules(drawn))
    return {f"{PREFIX}{name}": parameter.detach() for name, parameter in network.named_parameters()}


def _modules(names: Collection[str]) -> str:
    """List the modules of some parameters, for the log."""
    return ", ".join(sorted({name.rpartition(".")[0] for name in names}))


def sizes_of(path: Path) -> MEDConfig | None:
    """Read the sizes of a checkpoint's network without its weights.

    The result is None for a checkpoint in a run folder, whose recipe has the sizes.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`.
    """
    kind = format_of(path)
    if kind == "ours":
        folder = step_folder(path)
        assert folder is not None
        return network_of(folder)
    if kind == "salesforce":
        return salesforce_files.read_sizes(path)
    return huggingface.read_sizes(path)


def differences(first: MEDConfig, second: MEDConfig) -> dict[str, tuple[Any, Any]]:
    """Compare the sizes of two networks: name -> both values, for sizes that differ.

    The image size is not compared.
    """
    sizes, other = _sizes(first), _sizes(second)
    return {name: (sizes[name], other[name]) for name in sizes if sizes[name] != other[name]}


def _sizes(config: MEDConfig) -> dict[str, Any]:
    """Return the sizes that distinguish networks, except the image size."""
    with torch.device("meta"):
        vision = build_vision(config.vision)
    text = config.text
    return {
        "vision width": vision.embed_dim,
        "vision blocks": len(vision.blocks),
        "vision heads": vision.heads,
        "vision MLP width": vision.mlp_width,
        "vision tower": vision.description,
        "patch size": vision.patch_embed.patch_size[0],
        "text width": text.width,
        "text layers": text.layers,
        "text heads": text.heads,
        "text MLP width": text.mlp_width,
        "positions": text.max_positions,
        "vocabulary": text.vocab_size,
        "special tokens": text.special,
        "norm eps": text.norm_eps,
        "embed_dim": config.embed_dim,
    }
