"""What the network of a task holds, and how its parameters are named in our training checkpoints.

A task trains exactly the parts of its head and nothing else, so nothing that the head lacks is
decayed, saved or sent between ranks. Its network is one or more cut-down MEDs under names of their
own (`PREFIXES`), and below these names everything is called as in MED. So the names alone tell what
a checkpoint is of, and one table leads from it to the published layout and back:

- `pretrain` is `med.` with all of MED;
- `captioning` is `med.` without the encoder's self-attention, projections and matching head;
- `retrieval` is `med.` without the decoder's self-attention and LM head.

A head whose encoder and decoder share nothing has two prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from blip_scale.interop.salesforce import (
    PARTS,
    Head,
    State,
    from_salesforce,
    their_names,
    to_salesforce,
)
from blip_scale.model import MED, MEDConfig

PREFIXES: dict[Head, dict[str, tuple[str, ...]]] = {
    "pretrain": {"med.": PARTS["pretrain"]},
    "captioning": {"med.": PARTS["captioning"]},
    "retrieval": {"med.": PARTS["retrieval"]},
}
"""Head -> how the names of its MEDs begin, each with the parts of BLIP that it holds."""


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


def shapes_of(head: Head, config: MEDConfig) -> dict[str, torch.Size]:
    """Every parameter of a head's network, by its full name."""
    with torch.device("meta"):
        meds = {prefix: cut_down(MED(config), parts) for prefix, parts in PREFIXES[head].items()}
    return {
        f"{prefix}{name}": parameter.shape
        for prefix, med in meds.items()
        for name, parameter in med.named_parameters()
    }


def head_of_names(names: Iterable[str], config: MEDConfig) -> Head | None:
    """The head whose network has exactly these parameters; None: no head has."""
    found = set(names)
    return next((head for head in PREFIXES if set(shapes_of(head, config)) == found), None)


def to_published(tensors: Mapping[str, torch.Tensor], head: Head) -> State:
    """Parameters of a head's network by full name -> the published layout."""
    state: State = {}
    for prefix, parts in PREFIXES[head].items():
        mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        layout = to_salesforce(mine, head)
        state |= {name: t for name, t in layout.items() if name.partition(".")[0] in parts}
    return state


def from_published(state: State, head: Head, names: Iterable[str]) -> State:
    """The published layout of a head -> parameters of its network by full name."""
    names = list(names)
    result: State = {}
    for prefix, parts in PREFIXES[head].items():
        mine = {name: t for name, t in state.items() if name.partition(".")[0] in parts}
        own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        found = from_salesforce(mine, own)
        result |= {f"{prefix}{name}": tensor for name, tensor in found.items()}
    return result
