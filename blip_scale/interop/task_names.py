"""Conversion of parameter names of the VQA, NLVR2 and VisDial networks to published names and back.

In the published code too, encoder and decoder of these networks are two separate stacks, so every
parameter has one place. A VisDial network was never published. Its names follow the same rule, so
that it can start from a retrieval file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from blip_scale.interop.salesforce import State, complete, their_names

_OF_PAIR = {
    "query": ("self{}.query",),
    "key_value": ("self{}.key", "self{}.value"),
    "output": ("output.dense{}",),
}
_PAIR = re.compile(
    r"text_encoder\.layers\.(\d+)\.cross_attention\.images\.(\d)\.(\w+)\.(weight|bias)"
)
_MERGE = re.compile(r"text_encoder\.layers\.(\d+)\.cross_attention\.merge_layer\.(weight|bias)")
_CROSS = "text_encoder.encoder.layer.{}.crossattention."


def published_names(ours: str) -> tuple[str, ...]:
    """Return the published names of one parameter, in order along its first dimension.

    The result is empty for a parameter that the published network lacks.
    """
    pair, merge = _PAIR.fullmatch(ours), _MERGE.fullmatch(ours)
    if pair:
        layer, number, module, kind = pair.groups()
        names = (name.format(number) for name in _OF_PAIR.get(module, ()))
        return tuple(f"{_CROSS.format(layer)}{name}.{kind}" for name in names)
    if merge:
        return (f"{_CROSS.format(merge[1])}output.merge_layer.{merge[2]}",)
    section, _, rest = ours.partition(".")
    if section in ("text_encoder", "text_decoder"):
        return their_names(f"text.{rest}").get(section, ())
    if section in ("cls_head", "caption_proj"):
        return (ours,)
    return next(iter(their_names(ours).values()), ())


def task_to_published(parameters: Mapping[str, Tensor]) -> State:
    """Convert parameters to the published layout, including second names and position_ids.

    Parameters that the published network lacks are dropped.
    """
    state: State = {}
    for ours, tensor in parameters.items():
        names = published_names(ours)
        if names:
            state |= zip(names, tensor.chunk(len(names)), strict=True)
    return complete(state)


def task_from_published(state: Mapping[str, Tensor], names: Iterable[str]) -> State:
    """Select the parameters `names` from a complete published layout, as far as it has them."""
    result: State = {}
    for ours in names:
        pieces = [state[name] for name in published_names(ours)]
        if pieces:
            result[ours] = torch.cat(pieces)
    return result
