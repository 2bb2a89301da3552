"""Any BLIP checkpoint: what kind it is, its weights, and a MED filled with them."""

from __future__ import annotations

import logging
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
from blip_scale.interop.vision import interpolate_positions
from blip_scale.model.heads import OWN_NETWORKS, Head, build_network
from blip_scale.model.initialization import INIT_STD, fill_from_med, seeded
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.vision import build_vision

log = logging.getLogger(__name__)

_STARTS: dict[Head, tuple[Head, ...]] = {
    "vqa": ("pretrain",),
    "nlvr2": ("pretrain", "retrieval"),
    "visdial": ("pretrain", "retrieval"),
}
"""Heads with networks of their own -> those that hold the stacks which they start from."""

Format = Literal["ours", "salesforce", "hf"]


def format_of(path: Path) -> Format:
    """What a checkpoint is, by a look at it.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder of none of the kinds.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        return "salesforce"
    if step_folder(path):
        return "ours"
    if any((path / sub / "config.json").is_file() for sub in ("", "captioning")):
        return "hf"
    raise ValueError(
        f"{path} is no checkpoint: expected a training checkpoint (step_N with manifest.json, or "
        "the folder of a run), a .pth file, or a Hugging Face folder (config.json)"
    )


def read_checkpoint(
    path: Path, config: MEDConfig | None = None, with_state: bool = True
) -> BlipWeights:
    """The weights in a checkpoint of any kind.

    Args:
        path: `step_N` or a run's folder (its newest), `.pth`, or a Hugging Face folder.
        config: of the network, where the checkpoint doesn't say it; where it does, they must agree
            in all but the image size.
        with_state: also momentum copies and queues of a training checkpoint.

    Raises:
        FileNotFoundError: nothing is there, or a part of it is missing.
        ValueError: not BLIP, damaged, unsafe, or another network; names what.
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
            other = [f"{name} {ours}, not {theirs}" for name, (ours, theirs) in differing.items()]
            fix = "; give its own tokenizer as model.text.tokenizer, or --tokenizer of a command"
            hint = fix if "vocabulary" in differing else ""
            raise ValueError(
                f"{path} is of another network than the recipe's: {'; '.join(other)}{hint}"
            )
    return weights


def load_checkpoint(med: MED, path: Path) -> None:
    """Fills all of a plain MED; position embeddings are interpolated to its resolution.

    Raises:
        FileNotFoundError, ValueError: as `head_parameters`.
    """
    state = head_parameters(path, "pretrain", med.config)
    with torch.no_grad():
        for name, parameter in med.named_parameters():
            parameter.copy_(state[f"med.{name}"])


def head_parameters(
    path: Path, head: Head, config: MEDConfig, seed: int = 0, text_std: float = INIT_STD
) -> State:
    """The parameters of a head's network by full name, from a checkpoint of that head or of one
    that it can start from; position embeddings are interpolated to the network's resolution.

    Heads with networks of their own start from pretraining, those without a decoder from retrieval
    too; what it lacks is random from `seed`,
    linear layers of text stacks with std `text_std`. Parameters of losses, which only checkpoints
    of ours have, come along.

    Raises:
        FileNotFoundError: nothing is there, or a part of it is missing.
        ValueError: not BLIP, damaged, unsafe, another network, or a head that can't become this.
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
    if vision.pos_embed is not None:
        extra = vision.pos_embed.shape[1] - vision.patch_embed.num_patches
        state["med.vision.pos_embed"] = interpolate_positions(
            state["med.vision.pos_embed"], vision.patch_embed.grid_size, extra
        )
    log.info("all weights from %s%s", path, "".join(f"; {note}" for note in weights.notes))
    if grows:
        state = grown(state, head, config, seed, text_std)
    prefixes = (PREFIX, MOMENTUM_PREFIX)
    losses = {n: t for n, t in weights.unpublished.items() if not n.startswith(prefixes)}
    return state | losses


def grown(
    pretrained: State, head: Head, config: MEDConfig, seed: int, text_std: float = INIT_STD
) -> State:
    """The parameters of a head with a network of its own, out of those of a whole MED.

    What MED doesn't have is random from `seed`, and named in the log.
    """
    network = seeded(lambda: build_network(head, config), seed)
    drawn = fill_from_med(network, pretrained, seed, text_std)
    if drawn:
        modules = sorted({name.rpartition(".")[0] for name in drawn})
        log.info("not from pretraining but random: %s", ", ".join(modules))
    return {f"{PREFIX}{name}": parameter.detach() for name, parameter in network.named_parameters()}


def sizes_of(path: Path) -> MEDConfig | None:
    """The sizes of a checkpoint's network, without its weights; None where a run's recipe says
    them. Raises as `read_checkpoint`."""
    kind = format_of(path)
    if kind == "ours":
        folder = step_folder(path)
        assert folder is not None
        return network_of(folder)
    if kind == "salesforce":
        return salesforce_files.read_sizes(path)
    return huggingface.read_sizes(path)


def differences(first: MEDConfig, second: MEDConfig) -> dict[str, tuple[Any, Any]]:
    """What tells two networks apart, but for the resolution: name -> value of each."""
    one, other = _sizes(first), _sizes(second)
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def _sizes(config: MEDConfig) -> dict[str, Any]:
    """What tells one network from another, apart from the resolution."""
    with torch.device("meta"):
        vision = build_vision(config.vision)
    text = config.text
    return {
        "vision width": vision.embed_dim,
        "vision blocks": len(vision.blocks),
        "vision heads": vision.blocks[0].attn.num_heads,
        "vision MLP width": vision.blocks[0].mlp.fc1.out_features,
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
