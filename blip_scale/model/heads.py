"""The network of each head: MED, a part of it, or a separate network.

A head's network holds only the modules that the head needs. Otherwise, unused weights would be
decayed, saved and exchanged between ranks.
"""

from __future__ import annotations

import fnmatch
from typing import Literal, get_args

from torch import nn

from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.visdial import VisDial
from blip_scale.model.vqa import VQA

Head = Literal["pretrain", "captioning", "retrieval", "vqa", "nlvr2", "visdial"]
HEADS: tuple[Head, ...] = get_args(Head)

OWN_NETWORKS: dict[Head, type[VQA] | type[NLVR2] | type[VisDial]] = {
    "vqa": VQA,
    "nlvr2": NLVR2,
    "visdial": VisDial,
}
"""Heads whose networks are not parts of a MED."""
LEFT_OUT: dict[Head, tuple[str, ...]] = {
    "captioning": (
        "text.layers.*.self_attention_encoder",
        "vision_proj",
        "text_proj",
        "itm_head",
        "temperature",
    ),
    "retrieval": ("text.layers.*.self_attention_decoder", "lm_head"),
}
"""Modules of MED that a head doesn't need, as patterns of their paths. A new module of MED belongs
to every head that does not list it here."""


def cut_down(med: MED, head: Head) -> MED:
    """Delete the modules that a head doesn't need from a MED. Return the same MED."""
    for pattern in LEFT_OUT.get(head, ()):
        paths = [path for path, _ in med.named_modules()]
        for path in fnmatch.filter(paths, pattern):
            parent, _, child = path.rpartition(".")
            delattr(med.get_submodule(parent), child)
    return med


def freeze_unread(med: MED, matches: bool, decodes: bool) -> MED:
    """Freeze the modules that no loss reads. Otherwise an optimizer would decay them.

    Args:
        med: MED of the head `pretrain` or `retrieval`.
        matches: whether ITM is trained.
        decodes: whether LM is trained.

    Returns:
        The same MED.
    """
    if not matches:
        med.itm_head.requires_grad_(False)
    if not matches and not decodes:
        for layer in med.text.layers:
            layer.cross_attention.requires_grad_(False)
    return med


def build_network(head: Head, config: MEDConfig) -> nn.Module:
    """Build the network of a head, with unset weights: a reduced MED, or a separate network."""
    network = OWN_NETWORKS.get(head)
    return cut_down(MED(config), head) if network is None else network(config)
