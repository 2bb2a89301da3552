"""Weights of a BLIP model, independent of file formats: checked and with published names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_scale.interop.heads import (
    PREFIX,
    expected_shapes,
    from_published,
    is_published,
    shapes_of,
)
from blip_scale.interop.output_settings import OutputSettings, published, turned
from blip_scale.interop.salesforce import (
    PARTS,
    TIED,
    State,
    complete,
    is_training_state,
    momentum_to_salesforce,
)
from blip_scale.model.heads import Head, build_network
from blip_scale.model.initialization import name_in_med, seeded
from blip_scale.model.med import MEDConfig

log = logging.getLogger(__name__)

PUBLISHED_QUEUE = 57600
PUBLISHED_TEMPERATURE = 0.07
_NO_IMAGE_INDEX = -100


@dataclass
class BlipWeights:
    """Weights of one head. Create them with `checked`."""

    head: Head
    config: MEDConfig
    state: State
    """Tensors by published name (`salesforce`), with second names and position_ids; floats are
    fp32."""
    origin: str
    """Path that the weights were read from, for messages and the model card."""
    step: int | None = None
    """Number of optimizer steps of the training, if the source has it."""
    notes: list[str] = field(default_factory=list)
    """Sentences about values that were created instead of read."""
    unpublished: State = field(default_factory=dict)
    """Parameters that the published network lacks, by full name in a run. Names begin with `med.`
    for the network and with `momentum.` for its momentum copies. Other names are parameters of
    losses, which are flat. Only training checkpoints hold such parameters."""
    output: OutputSettings | None = None
    """Prompt, lengths, beams and scoring from the source. None: the source has none, like BLIP's
    own files."""

    @property
    def output_settings(self) -> OutputSettings:
        """Output settings of the source, or else the published ones."""
        return self.output or published(self.head)


def checked(weights: BlipWeights) -> BlipWeights:
    """Check that the weights have exactly the names and shapes of their head's layout.

    A missing temperature is set to the published one, because Hugging Face files have none. An
    incomplete training state is dropped, because LAVIS writes queues without momentum copies. Both
    are recorded in `notes`.

    Raises:
        ValueError: names or shapes do not match. The message lists them.
    """
    state = complete(weights.state)
    state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    if weights.head in ("pretrain", "retrieval") and "temp" not in state:
        state["temp"] = torch.tensor(PUBLISHED_TEMPERATURE)
        weights.notes.append(
            f"it has no temperature: set to {PUBLISHED_TEMPERATURE}, BLIP's initial value"
        )
    for name, first in TIED.items():
        if name in state and not torch.equal(state[name], state[first]):
            raise ValueError(f"{weights.origin}: {name} isn't equal to {first}; BLIP ties them")
    state = _without_partial_training_state(weights, state)
    queue = state.get("image_queue")
    size = None if queue is None else queue.shape[-1]
    shapes = expected_shapes(weights.head, weights.config, size)
    missing = sorted(set(shapes) - set(state))
    unknown = sorted(set(state) - set(shapes))
    wrong = []
    for name in sorted(set(shapes) & set(state)):
        if state[name].shape != shapes[name]:
            wrong.append(f"{name} {tuple(state[name].shape)}, wanted {tuple(shapes[name])}")
    if missing or unknown or wrong:
        kinds = (("missing", missing), ("left over", unknown), ("of another shape", wrong))
        problems = "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds if names)
        raise ValueError(
            f"{weights.origin} does not match BLIP's {weights.head} weights: {problems}"
        )
    weights.state = state
    return weights


def _without_partial_training_state(weights: BlipWeights, state: State) -> State:
    """Drop momentum copies and queues unless all of them are present with the right shapes.

    No conversion needs them.
    """
    present = {name for name in state if is_training_state(name)}
    if not present:
        return state
    queue = state.get("image_queue")
    size = 0 if queue is None else queue.shape[-1]
    shapes = expected_shapes(weights.head, weights.config, size)
    expected = {name for name in shapes if is_training_state(name)}
    if weights.head not in ("pretrain", "retrieval"):
        expected = set()
    wrong = sorted(name for name in present & expected if state[name].shape != shapes[name])
    for kind, names in (
        ("lacks", sorted(expected - present)),
        ("has no place for", sorted(present - expected)),
        ("has another shape of", wrong),
    ):
        if names:
            weights.notes.append(
                f"its momentum copies and queues are incomplete and left out (it {kind} "
                f"{_some(names)})"
            )
            return without_training_state(state)
    return state


def parameters_of(weights: BlipWeights, seed: int = 0) -> State:
    """Return all parameters of the head's network by full name.

    A parameter that neither the published network nor these weights have is initialised from
    `seed`. A warning names it.
    """
    shapes = shapes_of(weights.head, weights.config)
    state = from_published(weights.state, weights.head, shapes)
    state |= {name: weights.unpublished[name] for name in shapes if name in weights.unpublished}
    new = [n for n in shapes if n not in state and not is_published(n, weights.head)]
    if new:
        log.warning("%s lacks %s: randomly initialised", weights.origin, _some(new))
        network = seeded(lambda: build_network(weights.head, weights.config), seed)
        drawn = {f"{PREFIX}{name}": p.detach() for name, p in network.named_parameters()}
        state |= {name: drawn[name] for name in new}
    return state


def published_alone(weights: BlipWeights) -> BlipWeights:
    """Drop the parameters that the published network lacks, and name them in `notes`."""
    if not weights.unpublished:
        return weights
    note = (
        "left out, because the published network lacks it (readers of the file compute without "
        f"it): {', '.join(sorted(weights.unpublished))}"
    )
    return replace(weights, unpublished={}, notes=[*weights.notes, note])


def refuse_unpublished(weights: BlipWeights) -> None:
    """Refuse weights that published formats cannot hold.

    Raises:
        ValueError: the formats have no name for some parameters. The message lists them.
    """
    if weights.unpublished:
        raise ValueError(
            f"{weights.origin}: the published formats have no name for "
            f"{_some(sorted(weights.unpublished))}; write a training checkpoint, or drop them "
            "with blip_weights.published_alone"
        )


def turned_into(weights: BlipWeights, head: Head) -> BlipWeights:
    """Convert the weights to another head, without training state that the other head lacks.

    Raises:
        ValueError: the weights lack something that the head needs. The message says what.
    """
    if head == weights.head:
        return weights
    lacking = [part for part in PARTS[head] if part not in PARTS[weights.head]]
    reason = f"it has no {' and no '.join(lacking)}"
    vision_width = weights.state["visual_encoder.patch_embed.proj.weight"].shape[0]
    if weights.head == "vqa":
        reason = "its decoder reads the states of questions, not images, and it has no projections"
    elif weights.head == "nlvr2":
        reason = "its encoder reads two images with two cross-attentions"
    elif "visdial" in (weights.head, head):
        reason = "dialogs come from fine-tuning alone"
    elif head == "nlvr2":
        reason = "merge layers and classifier come from fine-tuning alone; "
        if weights.head == "pretrain":
            reason += (
                "the published NLVR2 code starts from the pretrain layout, so convert with "
                "--head pretrain"
            )
        else:
            reason += "give the file as model.checkpoint to recipe finetune_nlvr2"
    elif head == "vqa" and not lacking and vision_width != weights.config.text.width:
        reason = (
            f"its decoder would read question states of width {weights.config.text.width}, but "
            f"these weights read image tokens of width {vision_width}; the decoder's weights can "
            "only come from fine-tuning"
        )
    elif not lacking:
        output = turned(weights.output_settings, weights.head, head)
        return replace(_selected(weights, head), output=output)
    raise ValueError(f"{weights.origin} ({weights.head}) can't become {head}: {reason}")


def _selected(weights: BlipWeights, head: Head) -> BlipWeights:
    """Select the weights of a head from pretrained ones.

    A retrieval model also keeps the queues, like the published loader.
    """
    towers = tuple(f"{part}_m" for part in PARTS[head]) if head == "retrieval" else ()
    wanted = {*PARTS[head], *towers}
    state = {n: t for n, t in weights.state.items() if n.partition(".")[0] in wanted}
    notes = list(weights.notes)
    if head == "retrieval" and "image_queue" in weights.state:
        state |= {name: weights.state[name] for name in ("image_queue", "text_queue")}
        state |= _retrieval_pointers(state["image_queue"].shape[1])
        notes.append("idx_queue is -100 and ptr_queue 0, as the published loader leaves them")
    unpublished = _unpublished_of(weights, head)
    return replace(weights, head=head, state=state, notes=notes, unpublished=unpublished)


def _unpublished_of(weights: BlipWeights, head: Head) -> State:
    """Select the unpublished parameters of a head's network, renamed to the names in it.

    Parameters of momentum copies and losses keep their names.
    """
    state = {n: t for n, t in weights.unpublished.items() if not n.startswith(PREFIX)}
    for name in shapes_of(head, weights.config):
        source = PREFIX + name_in_med(name.removeprefix(PREFIX))
        if source in weights.unpublished:
            state[name] = weights.unpublished[source]
    return state


def _retrieval_pointers(size: int) -> State:
    return {
        "idx_queue": torch.full((1, size), _NO_IMAGE_INDEX, dtype=torch.int64),
        "ptr_queue": torch.zeros(1, dtype=torch.int64),
    }


def with_training_state(weights: BlipWeights) -> BlipWeights:
    """Add momentum copies and queues as the published code creates them, if there are none.

    The momentum copies equal the weights. The columns of the queues are random unit vectors.
    """
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
        "it has no momentum copies and queues: set to copies of the weights and "
        f"{PUBLISHED_QUEUE} random unit columns, as BLIP starts"
    )
    return replace(weights, state=state, notes=[*weights.notes, note])


def without_training_state(state: Mapping[str, Tensor]) -> State:
    """Drop momentum copies, queues and pointers from a state."""
    return {name: tensor for name, tensor in state.items() if not is_training_state(name)}


def united(captioning: BlipWeights, retrieval: BlipWeights, origin: str) -> BlipWeights:
    """Join pretrained weights from the two halves for which Hugging Face has model classes.

    Raises:
        ValueError: the halves belong to different networks.
    """
    for name in captioning.state.keys() & retrieval.state.keys():
        if not torch.equal(captioning.state[name], retrieval.state[name]):
            raise ValueError(
                f"{origin}: {name} differs between captioning and retrieval: they were fine-tuned "
                "apart and are not halves of one network"
            )
    state = retrieval.state | captioning.state
    notes = [*captioning.notes, *retrieval.notes]
    return BlipWeights(
        "pretrain",
        retrieval.config,
        state,
        origin,
        retrieval.step,
        notes,
        output=captioning.output,
    )


def depth(names: Mapping[str, Tensor], pattern: str) -> int:
    """Count the layers whose names start with `pattern` and a number."""
    matches = (re.match(rf"{pattern}\.(\d+)\.", name) for name in names)
    return len({match[1] for match in matches if match})


def one_line(error: Exception) -> str:
    """Return the message of an error in one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
