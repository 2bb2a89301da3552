"""A BLIP on its way between formats: checked weights under the published names, and what one head's
weights can be turned into."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.interop.heads import expected_shapes
from blip_scale.interop.salesforce import (
    PARTS,
    TIED,
    Head,
    State,
    complete,
    is_training_state,
    momentum_to_salesforce,
)
from blip_scale.model.med import MEDConfig

PUBLISHED_QUEUE = 57600
PUBLISHED_TEMPERATURE = 0.07
_NO_IMAGE_INDEX = -100


@dataclass
class BlipWeights:
    """One head's weights; `checked` makes it."""

    head: Head
    config: MEDConfig
    state: State
    """Published names (`salesforce`), second names and position_ids included; floats in fp32."""
    origin: str
    """What it was read from, for messages and the model card."""
    step: int | None = None
    """Optimizer steps of its training, where the source says it."""
    notes: list[str] = field(default_factory=list)
    """What was made and not read, in words."""


def checked(weights: BlipWeights) -> BlipWeights:
    """The weights, whole: every name of the layout there, none left over, every shape right.

    The temperature may be missing (Hugging Face has none), and the training state as a whole.

    Raises:
        ValueError: names what doesn't fit.
    """
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in complete(weights.state).items()
    }
    if weights.head in ("pretrain", "retrieval") and "temp" not in state:
        state["temp"] = torch.tensor(PUBLISHED_TEMPERATURE)
        weights.notes.append(
            f"it has no temperature: {PUBLISHED_TEMPERATURE}, with which BLIP starts"
        )
    untied = [
        name for name, first in TIED.items()
        if name in state and not torch.equal(state[name], state[first])
    ]  # fmt: skip
    if untied:
        raise ValueError(
            f"{weights.origin}: {untied[0]} isn't equal to {TIED[untied[0]]}; BLIP ties them"
        )
    queue = state.get("image_queue")
    if queue is None and any(map(is_training_state, state)):
        queue = torch.empty(weights.config.embed_dim, 0)  # all of it is named as missing
    size = None if queue is None else queue.shape[-1]
    shapes = expected_shapes(weights.head, weights.config, size)
    missing = sorted(set(shapes) - set(state))
    unknown = sorted(set(state) - set(shapes))
    wrong = [
        f"{name} {tuple(state[name].shape)}, wanted {tuple(shapes[name])}"
        for name in sorted(set(shapes) & set(state))
        if state[name].shape != shapes[name]
    ]
    if missing or unknown or wrong:
        kinds = (("missing", missing), ("left over", unknown), ("of another shape", wrong))
        found = "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds if names)
        raise ValueError(f"{weights.origin} doesn't fit as BLIP {weights.head} weights: {found}")
    weights.state = state
    return weights


def turned_into(weights: BlipWeights, head: Head) -> BlipWeights:
    """The weights as those of another head, without the training state it doesn't share.

    Raises:
        ValueError: this head lacks what the other needs; says what.
    """
    if head == weights.head:
        return weights
    lacking = [part for part in PARTS[head] if part not in PARTS[weights.head]]
    reason = f"it has no {' and no '.join(lacking)}"
    vision_width = weights.state["visual_encoder.cls_token"].shape[-1]
    if weights.head == "vqa":
        reason = "its decoder reads the states of questions, not images, and it has no projections"
    elif weights.head == "nlvr2":
        reason = "its encoder reads two images with two cross-attentions"
    elif "visdial" in (weights.head, head):
        reason = "dialogs come from fine-tuning alone"
    elif head == "nlvr2":
        reason = (
            "merge layers and classifier come from fine-tuning alone; the published NLVR2 code "
            "starts from the pretrain layout, so convert with --head pretrain"
        )
    elif head == "vqa" and not lacking and vision_width != weights.config.text.width:
        reason = (
            f"its decoder would read question states of width {weights.config.text.width}, and "
            f"the weights that are there read image tokens of width {vision_width}; they can only "
            "come from fine-tuning"
        )
    elif not lacking:
        return _selected(weights, head)
    raise ValueError(f"{weights.origin} ({weights.head}) can't become {head}: {reason}")


def _selected(weights: BlipWeights, head: Head) -> BlipWeights:
    """Of pretrained weights those of a head; a retrieval model takes over the queues too, as the
    published loader does."""
    towers = tuple(f"{part}_m" for part in PARTS[head]) if head == "retrieval" else ()
    wanted = {*PARTS[head], *towers}
    state = {n: t for n, t in weights.state.items() if n.partition(".")[0] in wanted}
    notes = list(weights.notes)
    if head == "retrieval" and "image_queue" in weights.state:
        state |= {name: weights.state[name] for name in ("image_queue", "text_queue")}
        state |= _retrieval_pointers(state["image_queue"].shape[1])
        notes.append("idx_queue -100 and ptr_queue 0, as the published loader leaves them")
    return BlipWeights(head, weights.config, state, weights.origin, weights.step, notes)


def _retrieval_pointers(size: int) -> State:
    return {
        "idx_queue": torch.full((1, size), _NO_IMAGE_INDEX, dtype=torch.int64),
        "ptr_queue": torch.zeros(1, dtype=torch.int64),
    }


def with_training_state(weights: BlipWeights) -> BlipWeights:
    """The weights with momentum copies and queues, made as the published code makes them at the
    start where there are none: copies of the weights, random unit columns."""
    if weights.head not in ("pretrain", "retrieval") or "image_queue" in weights.state:
        return weights
    generator = torch.Generator().manual_seed(0)
    shape = (weights.config.embed_dim, PUBLISHED_QUEUE)
    state = weights.state | momentum_to_salesforce({}, weights.state)
    for kind in ("image", "text"):
        state[f"{kind}_queue"] = F.normalize(torch.randn(shape, generator=generator), dim=0)
    if weights.head == "retrieval":
        state |= _retrieval_pointers(PUBLISHED_QUEUE)
    else:
        state["queue_ptr"] = torch.zeros(1, dtype=torch.int64)
    note = (
        "it has no momentum copies and queues: copies of the weights, and "
        f"{PUBLISHED_QUEUE} random unit columns, as BLIP starts"
    )
    return BlipWeights(
        weights.head, weights.config, state, weights.origin, weights.step, [*weights.notes, note]
    )


def without_training_state(state: Mapping[str, Tensor]) -> State:
    """The weights alone."""
    return {name: tensor for name, tensor in state.items() if not is_training_state(name)}


def united(captioning: BlipWeights, retrieval: BlipWeights, origin: str) -> BlipWeights:
    """Pretrained weights from the two halves that Hugging Face has models for.

    Raises:
        ValueError: they are halves of two models.
    """
    for name in captioning.state.keys() & retrieval.state.keys():
        if not torch.equal(captioning.state[name], retrieval.state[name]):
            raise ValueError(
                f"{origin}: {name} differs between captioning and retrieval: they were fine-tuned "
                "apart and are no halves of one network"
            )
    state = retrieval.state | captioning.state
    notes = [*captioning.notes, *retrieval.notes]
    return BlipWeights("pretrain", retrieval.config, state, origin, retrieval.step, notes)


def depth(names: Mapping[str, Tensor], pattern: str) -> int:
    """Number of layers whose names start with `pattern` and a number."""
    found = (re.match(rf"{pattern}\.(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def one_line(error: Exception) -> str:
    """What an error says, short and in one line."""
    return " ".join(str(error).split())[:300]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
