"""How the parameters of a head's network (`model.heads`) are named in our training checkpoints, and
which of them the published layout knows.

All names of the network begin with `med.`. What follows tells which head a checkpoint is of, and
leads to the published layout and back. A parameter that the published network doesn't have is in
our checkpoints like any other and in no other file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from blip_scale.interop.salesforce import (
    TOWERS,
    State,
    from_salesforce,
    their_names,
    to_salesforce,
)
from blip_scale.interop.task_names import published_names, task_from_published, task_to_published
from blip_scale.model.heads import HEADS, OWN_NETWORKS, Head, build_network
from blip_scale.model.med import MEDConfig

PREFIX = "med."
"""How the names of all parameters of a head's network begin."""
MOMENTUM_PREFIX = "momentum."
"""How the names of their momentum copies begin."""


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


def is_published(name: str, head: Head) -> bool:
    """Whether the published network of a head has this parameter, given by its full name."""
    names = published_names if head in OWN_NETWORKS else their_names
    return name.startswith(PREFIX) and bool(names(name.removeprefix(PREFIX)))


def head_of_names(names: Iterable[str], config: MEDConfig) -> Head | None:
    """The head whose network has exactly these parameters, apart from those that the published
    network doesn't have; None: no head has."""
    names = set(names)
    for head in HEADS:
        expected = {name for name in shapes_of(head, config) if is_published(name, head)}
        if expected == {name for name in names if is_published(name, head)}:
            return head
    return None


def to_published(tensors: Mapping[str, torch.Tensor], head: Head) -> State:
    """Parameters of a head's network by full name -> the published layout, which lacks those that
    aren't `is_published`."""
    mine = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return task_to_published(mine) if head in OWN_NETWORKS else to_salesforce(mine, head)


def from_published(state: State, head: Head, names: Iterable[str]) -> State:
    """The published layout of a head -> parameters of its network by full name, as far as the
    layout has them."""
    read = task_from_published if head in OWN_NETWORKS else from_salesforce
    parameters = read(state, [name.removeprefix(PREFIX) for name in names])
    return {f"{PREFIX}{name}": tensor for name, tensor in parameters.items()}
