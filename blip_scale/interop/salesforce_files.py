"""Reader and writer of the `.pth` files of BLIP's published code."""

from __future__ import annotations

import dataclasses
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_scale.interop import output_settings
from blip_scale.interop.blip_weights import (
    BlipWeights,
    checked,
    depth,
    one_line,
    refuse_unpublished,
)
from blip_scale.interop.salesforce import State, head_of
from blip_scale.interop.vision import patches_per_side
from blip_scale.model.med import MEDConfig
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig, build_vision

_HEAD_WIDTH = 64
"""Channels per attention head in all published networks. Tensor shapes do not show it."""
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "module.")
"""Prefixes of names to strip, in this order."""
_BERT_WORDS = 30522
"""Vocabulary size of bert-base-uncased, without [DEC] and [ENC]."""
_NETWORK = "network"
"""Key of the network's sizes in files that this package writes, next to `model`."""
_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError)
"""Errors of torch's unpickler on bytes that are not a pickle."""


class UnknownSizesError(ValueError):
    """The content and shapes of a file do not determine the sizes of its network."""


def read_salesforce(path: Path, config: MEDConfig | None = None) -> BlipWeights:
    """Read a file in the published layout. Tensors stay on the disk until they are used.

    Args:
        path: the `.pth` file.
        config: sizes of the network, for files that do not state their number of heads. None:
            assume the published 64 channels per head.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is an unsafe pickle, damaged, or of another model, or its names or
            shapes do not match.
    """
    loaded = load_pth(path)
    state = _state_dict(loaded, path)
    try:
        head = head_of(state)
        config = _sizes(loaded, state, config)
        settings = loaded.get(output_settings.KEY)
        output = None if settings is None else output_settings.from_json(settings)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    step = loaded.get("step")
    return checked(BlipWeights(head, config, state, str(path), step, output=output))


def read_sizes(path: Path) -> MEDConfig:
    """Read the sizes of a file's network without its weights.

    Raises:
        UnknownSizesError: the file does not determine the sizes.
        FileNotFoundError, ValueError: see `read_salesforce`.
    """
    loaded = load_pth(path)
    try:
        return _sizes(loaded, _state_dict(loaded, path), None)
    except UnknownSizesError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def states_sizes(path: Path) -> bool:
    """Whether a file states the sizes of its network, like the files that this package writes.

    Raises:
        FileNotFoundError, ValueError: see `load_pth`.
    """
    return _NETWORK in load_pth(path)


def _sizes(loaded: dict[str, Any], state: State, config: MEDConfig | None) -> MEDConfig:
    """Return the sizes stated in the file, else `config`, else sizes inferred from the shapes."""
    return at_their_resolution(_network(loaded) or config or _guessed(state), state)


def _state_dict(loaded: Mapping[str, Any], path: Path) -> State:
    """Extract the state dict of a file.

    It may be nested in `model` or `state_dict`. Prefixes of DistributedDataParallel and
    torch.compile are removed from the names.

    Raises:
        ValueError: there is no state dict. The message names the keys that the file has.
    """
    content: Any = loaded
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if key in content), None)
        if not isinstance(inner, Mapping):
            break
        content = inner
    is_state = all(isinstance(tensor, Tensor) for tensor in content.values())
    if not content or not is_state:
        shown = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ValueError(
            f"{path}: no state dict; expected one under `model` or `state_dict`, or as the whole "
            f"file, but it holds {shown}"
        )
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return {name: tensor.detach() for name, tensor in content.items()}


def write_salesforce(weights: BlipWeights, path: Path) -> None:
    """Write a file for the published loaders: `model`, with sizes and output settings next to it.

    Raises:
        ValueError: there are parameters that the published network lacks. The message names them.
    """
    refuse_unpublished(weights)
    network = dataclasses.asdict(weights.config)
    content = {
        "model": weights.state,
        _NETWORK: network,
        "step": weights.step,
        output_settings.KEY: dataclasses.asdict(weights.output_settings),
    }
    torch.save(content, path)


def load_pth(path: Path) -> dict[str, Any]:
    """Load a dictionary of tensors and plain values, memory-mapped if the format allows it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is an unsafe pickle, damaged, or does not hold a dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged or incomplete: the end of the file is missing")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error) or "GLOBAL" not in str(error):
            raise ValueError(f"{path} is not a PyTorch file, or damaged") from error
        raise ValueError(
            f"{path} holds more than tensors, and loading it could run any code: refused. If you "
            "trust its author, save the tensors alone: torch.save({'model': "
            "torch.load(FILE, weights_only=False)['model']}, NEW_FILE)"
        ) from error
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; expected a dict with `model`")
    return loaded


def at_their_resolution(config: MEDConfig, state: State) -> MEDConfig:
    """Set the image size of a config to that of the state's position parameters."""
    with torch.device("meta"):
        vision = build_vision(config.vision)
    side = patches_per_side(state, vision, "visual_encoder.")
    pixels = None if side is None else side * vision.patch_embed.patch_size[0]
    if pixels is None or pixels == config.vision.image_size:
        return config
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=pixels))


def _network(loaded: dict[str, Any]) -> MEDConfig | None:
    network = loaded.get(_NETWORK)
    return None if network is None else med_config_from(network)


def med_config_from(network: Mapping[str, Any]) -> MEDConfig:
    """Build a MEDConfig from the dictionary that dataclasses.asdict makes of it.

    Raises:
        TypeError, KeyError, ValueError: the dictionary is not a MEDConfig.
    """
    text = dict(network["text"])
    special = SpecialTokens(**text.pop("special"))
    rest = {name: value for name, value in network.items() if name not in ("vision", "text")}
    return MEDConfig(VisionConfig(**network["vision"]), TextConfig(special, **text), **rest)


def _guessed(state: State) -> MEDConfig:
    """Infer sizes from shapes and the published number of channels per head."""
    encoder = any(name.startswith("text_encoder.") for name in state)
    bert = "text_encoder" if encoder else "text_decoder.bert"
    words = state[f"{bert}.embeddings.word_embeddings.weight"]
    vision = state["visual_encoder.patch_embed.proj.weight"]
    hidden = state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0]
    for kind, width in (("text", words.shape[1]), ("vision", vision.shape[0])):
        if width not in (768, 1024):
            raise UnknownSizesError(
                f"the file does not state its number of {kind} heads, and its width {width} is "
                "not a published one; give --recipe with the network's sizes"
            )
    vocabulary = words.shape[0]
    if vocabulary == _BERT_WORDS:
        raise ValueError(
            f"its word embeddings have {vocabulary} rows, like bert-base-uncased and ALBEF: "
            "without [DEC] and [ENC] the model can neither caption nor match. BLIP's published "
            f"files have {vocabulary + 2} rows"
        )
    return MEDConfig(
        VisionConfig(
            "vit_base_patch16_224",
            224,
            {
                "patch_size": vision.shape[-1],
                "embed_dim": vision.shape[0],
                "depth": depth(state, re.escape("visual_encoder.blocks")),
                "num_heads": vision.shape[0] // _HEAD_WIDTH,
                "mlp_ratio": hidden / vision.shape[0],
            },
        ),
        TextConfig(
            SpecialTokens(pad=0, cls=101, sep=102, enc=vocabulary - 1, dec=vocabulary - 2),
            vocabulary,
            words.shape[1],
            depth(state, re.escape(f"{bert}.encoder.layer")),
            words.shape[1] // _HEAD_WIDTH,
            state[f"{bert}.encoder.layer.0.intermediate.dense.weight"].shape[0],
            state[f"{bert}.embeddings.position_embeddings.weight"].shape[0],
        ),
        state["vision_proj.weight"].shape[0] if "vision_proj.weight" in state else 256,
    )
