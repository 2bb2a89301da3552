"""What the network of a task holds, and how its parameters are named in our training checkpoints.

A task trains exactly the parts of its head and nothing else, so nothing that the head lacks is
decayed, saved or sent between ranks. All names begin with `med.`; what follows tells what a
checkpoint is of, and leads to the published layout and back:

- `pretrain` is all of MED;
- `captioning` is MED without the encoder's self-attention, projections and matching head;
- `retrieval` is MED without the decoder's self-attention and LM head;
- `vqa`, `nlvr2` and `visdial` are networks of their own (`OWN_NETWORKS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from blip_scale.interop.salesforce import (
    HEADS,
    PARTS,
    TOWERS,
    Head,
    State,
    from_salesforce,
    their_names,
    to_salesforce,
)
from blip_scale.interop.task_names import task_from_published, task_to_published
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.visdial import VisDial
from blip_scale.model.vqa import VQA

PREFIX = "med."
"""How the names of all parameters of a task's network begin."""
OWN_NETWORKS: dict[Head, type[VQA] | type[NLVR2] | type[VisDial]] = {
    "vqa": VQA,
    "nlvr2": NLVR2,
    "visdial": VisDial,
}
"""Heads whose networks aren't parts of a MED."""


def cut_down(med: MED, parts: Iterable[str]) -> MED:
    """The MED with modules of some parts alone (`PARTS`); the others are deleted from it."""
    names = [name for name, _ in med.named_parameters()]
    kept = {name for name in names if not set(their_names(name)).isdisjoint(parts)}
    for path in [path for path, _ in med.named_modules() if path]:
        inside = [name for name in names if name.startswith(f"{path}.")]
        if inside and kept.isdisjoint(inside):
            above, _, child = path.rpartition(".")
            delattr(med.get_submodule(above), child)
            names = [name for name in names if name not in inside]
    return med


def build_network(head: Head, config: MEDConfig) -> nn.Module:
    """The network of a head, weights not filled: a MED with its parts alone, or one of its own."""
    own = OWN_NETWORKS.get(head)
    return cut_down(MED(config), PARTS[head]) if own is None else own(config)


def shapes_of(head: Head, config: MEDConfig) -> dict[str, torch.Size]:
    """Every parameter of a head's network, by its full name."""
    with torch.device("meta"):
        network = build_network(head, config)
    return {f"{PREFIX}{name}": p.shape for name, p in network.named_parameters()}


def expected_shapes(head: Head, config: MEDConfig, queue_size: int | None) -> dict[str, torch.Size]:
    """Every name of a head's published layout with its shape.

    Args:
        queue_size: columns of the queues; None leaves the training state out.
    """
    mine = {
        name: torch.empty(shape, device="meta") for name, shape in shapes_of(head, config).items()
    }
    shapes = {name: tensor.shape for name, tensor in to_published(mine, head).items()}
    if queue_size is not None:
        for name in [name for name in shapes if name.partition(".")[0] in TOWERS]:
            part, _, rest = name.partition(".")
            shapes[f"{part}_m.{rest}"] = shapes[name]
        for kind in ("image", "text"):
            shapes[f"{kind}_queue"] = torch.Size((config.embed_dim, queue_size))
        if head == "retrieval":
            shapes["idx_queue"] = torch.Size((1, queue_size))
        shapes["ptr_queue" if head == "retrieval" else "queue_ptr"] = torch.Size((1,))
    return shapes


def head_of_names(names: Iterable[str], config: MEDConfig) -> Head | None:
    """The head whose network has exactly these parameters; None: no head has."""
    found = set(names)
    return next((head for head in HEADS if set(shapes_of(head, config)) == found), None)


def to_published(tensors: Mapping[str, torch.Tensor], head: Head) -> State:
    """Parameters of a head's network by full name -> the published layout."""
    mine = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return task_to_published(mine) if head in OWN_NETWORKS else to_salesforce(mine, head)


def from_published(state: State, head: Head, names: Iterable[str]) -> State:
    """The published layout of a head -> parameters of its network by full name."""
    own = [name.removeprefix(PREFIX) for name in names]
    is_own = head in OWN_NETWORKS
    found = task_from_published(state, own) if is_own else from_salesforce(state, own)
    return {f"{PREFIX}{name}": tensor for name, tensor in found.items()}
