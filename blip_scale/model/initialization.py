"""Random initial weights as in Li et al. 2022, with the conventions of ViT and BERT."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from blip_scale.model.med import MED

INIT_STD = 0.02
N = TypeVar("N", bound=nn.Module)


def seeded(build: Callable[[], N], seed: int) -> N:
    """Build a network on the CPU with torch's generator seeded, and restore the generator.

    A parameter without a rule in `init_weights` or `fill_from_med` keeps the value of its
    constructor. The seed makes this value equal on all ranks and in every start.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


@torch.no_grad()
def init_weights(
    med: MED, seed: int, vision_std: float = INIT_STD, text_std: float = INIT_STD
) -> None:
    """Initialize a MED that is not partitioned. The result depends only on `seed`.

    - ViT: linear layers truncated normal with std `vision_std`. Class token, registers and position
      embeddings truncated normal with std 0.02. Patch convolution: PyTorch's default.
    - Text: linear layers normal with std `text_std`. Embeddings and LM head normal with std 0.02.
    - Contrastive projections and matching head: PyTorch's default for linear layers.
    - Biases 0, except where PyTorch's default is used. Norms: weight 1, bias 0.

    Parameters of other modules are not changed; see `seeded`.
    """
    generator = torch.Generator(device=next(med.parameters()).device).manual_seed(seed)
    vision = med.vision
    for name in ("cls_token", "pos_embed", "reg_token", "dist_token"):
        token = getattr(vision, name, None)
        if token is not None:
            nn.init.trunc_normal_(token, std=INIT_STD, generator=generator)
    for module in vision.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=vision_std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            _torch_default(module, generator)
        else:
            _reset_simple(module)
    for part in (med.text, med.lm_head):
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                layer = part is med.text and isinstance(module, nn.Linear)
                std = text_std if layer else INIT_STD
                nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            _reset_simple(module)
    nn.init.zeros_(med.lm_head.bias)
    for head in (med.vision_proj, med.text_proj, med.itm_head):
        _torch_default(head, generator)
    med.temperature.value.fill_(med.temperature.initial)


@torch.no_grad()
def fill_from_med(
    network: nn.Module, med: Mapping[str, Tensor], seed: int, text_std: float = INIT_STD
) -> list[str]:
    """Initialize a VQA, NLVR2 or VisDial network from a MED, as in the published fine-tuning.

    Encoder and decoder both get the weights that they share in MED. Both cross-attentions of NLVR2
    get MED's. Parameters that MED lacks, or has in another shape, are drawn from `seed`: linear
    layers of the text stacks normal with std `text_std` and biases 0, other heads with PyTorch's
    default. Parameters outside linear layers keep the value of their constructor; see `seeded`.

    Args:
        network: network that is not partitioned, changed in place.
        med: parameters of a MED by name, with or without the prefix `med.`.
        seed: seed of the drawn parameters.
        text_std: standard deviation of drawn linear layers of the text stacks.

    Returns:
        Names of the parameters that were not taken from MED.
    """
    generator = torch.Generator().manual_seed(seed)
    there = {name.removeprefix("med."): tensor for name, tensor in med.items()}
    drawn = []
    modules = dict(network.named_modules())
    for name, parameter in network.named_parameters():
        source = there.get(name_in_med(name))
        if source is not None and source.shape == parameter.shape:
            parameter.copy_(source)
            continue
        drawn.append(name)
        path, _, kind = name.rpartition(".")
        module = modules[path]
        if not isinstance(module, nn.Linear):
            continue
        if not name.startswith("text_"):
            if kind == "weight":
                _torch_default(module, generator)
        elif kind == "weight":
            nn.init.normal_(module.weight, std=text_std, generator=generator)
        else:
            nn.init.zeros_(module.bias)
    return drawn


def name_in_med(name: str) -> str:
    """Return the name in MED of a parameter of a VQA, NLVR2 or VisDial network."""
    name = re.sub(r"^text_(encoder|decoder)\.", "text.", name)
    return re.sub(r"\.cross_attention\.images\.[01]\.", ".cross_attention.", name)


def _reset_simple(module: nn.Module) -> None:
    """Reset a norm or layer scale. Both have constant initial values."""
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.gamma, module.init_values)


def _torch_default(module: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    """Initialize like PyTorch's reset_parameters, but draw from `generator`."""
    nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
    if module.bias is not None:
        bound = 1 / math.sqrt(module.weight[0].numel())
        nn.init.uniform_(module.bias, -bound, bound, generator=generator)
