"""Parameter names of heads (`model.heads`) in training checkpoints, and their published names.

All names of a network begin with `med.`. The rest of the names determines the head of a checkpoint,
and can be converted to the published layout and back. Parameters that the published network lacks
are stored only in training checkpoints, like any other parameter.
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
"""Prefix of the names of all parameters of a head's network."""
MOMENTUM_PREFIX = "momentum."
"""Prefix of the names of momentum copies."""


def shapes_of(head: Head, config: MEDConfig) -> dict[str, torch.Size]:
    """Return the shape of every parameter of a head's network, by full name."""
    with torch.device("meta"):
        network = build_network(head, config)
    return {f"{PREFIX}{name}": p.shape for name, p in network.named_parameters()}


def expected_shapes(head: Head, config: MEDConfig, queue_size: int | None) -> dict[str, torch.Size]:
    """Return the shape of every tensor in a head's published layout, by published name.

    Args:
        head: head whose layout is returned.
        config: sizes of the network.
        queue_size: number of columns of the queues. None: omit the training state.
    """
    placeholders = {
        name: torch.empty(shape, device="meta") for name, shape in shapes_of(head, config).items()
    }
    shapes = {name: tensor.shape for name, tensor in to_published(placeholders, head).items()}
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
    """Return True if the published network of a head has the parameter with this full name."""
    names = published_names if head in OWN_NETWORKS else their_names
    return name.startswith(PREFIX) and bool(names(name.removeprefix(PREFIX)))


def head_of_names(names: Iterable[str], config: MEDConfig) -> Head | None:
    """Find the head whose network has exactly these parameters, or return None.

    Parameters that the published network lacks are not compared.
    """
    names = set(names)
    for head in HEADS:
        expected = {name for name in shapes_of(head, config) if is_published(name, head)}
        if expected == {name for name in names if is_published(name, head)}:
            return head
    return None


def to_published(tensors: Mapping[str, torch.Tensor], head: Head) -> State:
    """Convert parameters of a head's network, by full name, to the published layout.

    Parameters that the published network lacks are dropped.
    """
    parameters = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return (
        task_to_published(parameters) if head in OWN_NETWORKS else to_salesforce(parameters, head)
    )


def from_published(state: State, head: Head, names: Iterable[str]) -> State:
    """Convert the published layout of a head to parameters by full name, as far as it has them."""
    read = task_from_published if head in OWN_NETWORKS else from_salesforce
    parameters = read(state, [name.removeprefix(PREFIX) for name in names])
    return {f"{PREFIX}{name}": tensor for name, tensor in parameters.items()}
