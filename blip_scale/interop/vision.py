"""Loader of vision weights from timm's hub or from a file, at any resolution."""

from __future__ import annotations

import logging
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from blip_scale.model.med import MED
from blip_scale.model.towers import RELATIVE_TABLE, ImageTower
from blip_scale.storage import hub

log = logging.getLogger(__name__)

_CLASSIFIER = re.compile(r"^(head|head_dist|fc_norm|pre_logits)\.")
"""Names of classifier parts. Some towers have the norm `fc_norm`; no tower has the others."""
_PREFIX = "visual_encoder."
"""Prefix of the ViT's names in BLIP's published checkpoints. The rest of a name is timm's."""


def load_vision(med: MED, checkpoint: str | Path) -> None:
    """Load the tower of a MED that is not partitioned. Position embeddings are interpolated.

    Args:
        med: network whose tower is set.
        checkpoint: `timm` for timm's pretrained weights of the same model, or a file with timm's
            names, with or without the prefix `visual_encoder.`. The file is .safetensors, or .pth
            with only tensors.
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
    wanted = vision.state_dict()
    unused = {key for key in state if _CLASSIFIER.match(key) and key not in wanted}
    state = fitted_positions({k: v for k, v in state.items() if k not in unused}, vision)
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


def fitted_positions(
    state: Mapping[str, Tensor], vision: ImageTower, prefix: str = ""
) -> dict[str, Tensor]:
    """Resize the position parameters in a state to the resolution of a tower.

    Position embeddings are interpolated as in BLIP, and BEiT's tables of relative positions as in
    timm. Rotary embeddings have no parameters that depend on the resolution.

    Args:
        state: parameters by name. Other parameters are unchanged.
        vision: tower with the new resolution, not partitioned, on any device.
        prefix: prefix of the tower's names in `state`.
    """
    fitted = dict(state)
    grid = vision.patch_embed.grid_size
    for name, source, shape, extra in _positions(state, vision, prefix):
        if extra is None:
            fitted[name] = resize_rel_pos_bias_table(source, grid, shape)
        else:
            fitted[name] = interpolate_positions(source, grid, extra)
    return fitted


def patches_per_side(state: Mapping[str, Tensor], vision: ImageTower, prefix: str) -> int | None:
    """Return the side of the patch grid for which a state's position parameters were made.

    See `fitted_positions` for the arguments. None: the tower has no such parameters.
    """
    for _, source, _, extra in _positions(state, vision, prefix):
        if extra is None:  # (2 * side - 1) squared distances, plus three for the class token
            return (math.isqrt(max(source.shape[0] - 3, 0)) + 1) // 2 or None
        return math.isqrt(max(source.shape[1] - extra, 0)) or None
    return None


def _positions(
    state: Mapping[str, Tensor], vision: ImageTower, prefix: str
) -> Iterator[tuple[str, Tensor, tuple[int, ...], int | None]]:
    """Yield a state's position parameters: name, value, the tower's shape, number of extra tokens.

    The extra tokens have positions but are not patches. None: a table of relative positions.
    """
    for name, parameter in vision.named_parameters():
        source = state.get(f"{prefix}{name}")
        if source is None:
            continue
        if name == "pos_embed" and source.dim() == 3:
            # In some models (DeiT III) the class token has no position embedding.
            extra = parameter.shape[1] - vision.patch_embed.num_patches
            yield f"{prefix}{name}", source, tuple(parameter.shape), extra
        elif name.endswith(RELATIVE_TABLE) and source.dim() == 2:
            yield f"{prefix}{name}", source, tuple(parameter.shape), None


def interpolate_positions(positions: Tensor, grid: tuple[int, int], extra: int = 1) -> Tensor:
    """Resize position embeddings [1, extra + s * s, D] to another grid of patches.

    The interpolation is BLIP's: bicubic, align_corners False, no antialiasing. The embeddings of
    the first `extra` tokens are unchanged.

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
