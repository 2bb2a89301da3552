"""Vision weights from timm's hub or from a file, at any resolution."""

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
"""Classifier parts, which BLIP's ViT doesn't have."""
_PREFIX = "visual_encoder."
"""Of the ViT in the official BLIP checkpoints, where it has timm's names."""


def load_vision(med: MED, checkpoint: str | Path) -> None:
    """Fills the ViT of a plain MED; position embeddings are interpolated to its resolution.

    Args:
        med: the network to fill.
        checkpoint: `timm` for timm's pretrained weights of the same model, or a file (.safetensors,
            or .pth holding tensors alone) with timm's names, bare or under `visual_encoder.`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names or shapes that don't fit, all named.
    """
    vision = med.vision
    name = med.config.vision.name
    state = _timm_weights(name) if str(checkpoint) == "timm" else _read(checkpoint)
    if any(name.startswith(_PREFIX) for name in state):
        state = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    state = {key: value for key, value in state.items() if not _IGNORED.match(key)}
    wanted = vision.state_dict()
    if "pos_embed" in state and vision.pos_embed is not None:
        # Without its class token's position in some models (DeiT III): then none is kept aside.
        extra = 0 if vision.no_embed_class else vision.num_prefix_tokens
        state["pos_embed"] = interpolate_positions(
            state["pos_embed"], vision.patch_embed.grid_size, extra
        )
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    wrong = [
        f"{key} {tuple(state[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in sorted(set(wanted) & set(state))
        if state[key].shape != wanted[key].shape
    ]
    if missing or unknown or wrong:
        raise ValueError(
            f"vision checkpoint {checkpoint} doesn't fit {name} with overrides "
            f"{med.config.vision.overrides}: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"wrong shapes {wrong[:3]}"
        )
    vision.load_state_dict(state)
    log.info("vision weights from %s", checkpoint)


def interpolate_positions(positions: Tensor, grid: tuple[int, int], extra: int = 1) -> Tensor:
    """Position embeddings [1, extra + s * s, D] for another grid of patches: bicubic, align_corners
    False, no antialiasing, as BLIP does; those of the `extra` first tokens are kept.

    Raises:
        ValueError: the source grid isn't square.
    """
    count = positions.shape[1] - extra
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"position embeddings: {count} patches are no square grid")
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
            f"vision checkpoint {path} isn't there; give a .safetensors or .pth file, or `timm`"
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
