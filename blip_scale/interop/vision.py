"""Load vision weights from timm's hub or from a file, at any resolution."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blip_scale.model.med import MED
from blip_scale.storage import hub

log = logging.getLogger(__name__)

_IGNORED = re.compile(r"^(head|head_dist|fc_norm|pre_logits)\.")
"""Names of classifier parts, which BLIP's ViT does not have."""
_PREFIX = "visual_encoder."
"""Prefix of the ViT's names in BLIP's published checkpoints; the rest are timm's names."""


def load_vision(med: MED, checkpoint: str | Path) -> None:
    """Fill the ViT of an unpartitioned MED; position embeddings are interpolated if needed.

    Args:
        med: network to fill.
        checkpoint: `timm` for timm's pretrained weights of the same model, or a file with timm's
            names, with or without the prefix `visual_encoder.`. The file is .safetensors, or .pth
            with tensors only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or shapes do not match. The message lists them.
    """
    vision = med.vision
    name = med.config.vision.name
    state = _timm_weights(name) if str(checkpoint) == "timm" else _read(checkpoint)
    if any(name.startswith(_PREFIX) for name in state):
        state = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    state = {key: value for key, value in state.items() if not _IGNORED.match(key)}
    wanted = vision.state_dict()
    if "pos_embed" in state and vision.pos_embed is not None:
        # In some models (DeiT III) the class token has no position embedding.
        extra = 0 if vision.no_embed_class else vision.num_prefix_tokens
        state["pos_embed"] = interpolate_positions(
            state["pos_embed"], vision.patch_embed.grid_size, extra
        )
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    wrong = []
    for key in sorted(set(wanted) & set(state)):
        shape, expected = state[key].shape, wanted[key].shape
        if shape != expected:
            wrong.append(f"{key} {tuple(shape)}, wanted {tuple(expected)}")
    if missing or unknown or wrong:
        raise ValueError(
            f"vision checkpoint {checkpoint} does not match {name} with overrides "
            f"{med.config.vision.overrides}: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"wrong shapes {wrong[:3]}"
        )
    vision.load_state_dict(state)
    log.info("vision weights from %s", checkpoint)


def interpolate_positions(positions: Tensor, grid: tuple[int, int], extra: int = 1) -> Tensor:
    """Resize position embeddings [1, extra + s * s, D] to another grid of patches.

    The interpolation is BLIP's: bicubic, align_corners False, no antialiasing. The embeddings of
    the first `extra` tokens are kept.

    Raises:
        ValueError: the source grid is not square.
    """
    count = positions.shape[1] - extra
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"position embeddings: {count} patches are not a square grid")
    if (side, side) == tuple(grid):
        return positions
    kept, patches = positions[:, :extra], positions[:, extra:]
    square = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    square = F.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([kept, square.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def _timm_weights(name: str) -> dict[str, Tensor]:
    pretrained = timm.get_pretrained_cfg(name)
    if pretrained is not None and pretrained.hf_hub_id:
        files = ("model.safetensors", "pytorch_model.bin")
        hub.is_local(pretrained.hf_hub_id, files, "model.vision.checkpoint", "FILE")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"vision checkpoint timm: no weights of {name}: {error}") from error


def _read(checkpoint: str | Path) -> dict[str, Tensor]:
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"vision checkpoint {path} does not exist; give a .safetensors or .pth file, or `timm`"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"vision checkpoint {path} holds more than tensors, which is unsafe to read: {error}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, LookupError, TypeError) as error:
        raise ValueError(f"vision checkpoint {path} is damaged: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"vision checkpoint {path} holds no state dict")
    for key in ("model", "state_dict"):
        loaded = loaded.get(key, loaded)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"vision checkpoint {path} holds no state dict")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
