"""Alarms for losses that differ from those of `log.reference`.

A loss is far from its reference if it differs by more than `TOLERANCE` x the reference and by more
than `FLOOR`. The alarm begins after `POINTS` consecutive logged points. It is used only if the run
fulfils the conditions of the reference (`needs`, `samples_per_epoch`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

from blip_scale.config.loss_reference import Reference, load
from blip_scale.config.recipe import Recipe
from blip_scale.engine.watching.monitor import Alarm

logger = logging.getLogger(__name__)

TOLERANCE = 0.25
FLOOR = 0.05
POINTS = 20


def chosen_reference(
    recipe: Recipe, samples_per_epoch: int
) -> tuple[Reference | None, tuple[Alarm, ...]]:
    """Load the reference that a recipe names, and create its alarms if the run is comparable.

    If the run is not comparable, log the reasons. The curves are still drawn.
    """
    name = recipe.log.reference
    if name is None:
        return None, ()
    reference = load(name)
    reasons = reference.differences(recipe, samples_per_epoch)
    if reasons:
        logger.warning(
            "log.reference: %s is drawn without an alarm, because this run is not comparable: %s",
            name, "; ".join(reasons),
        )  # fmt: skip
        return reference, ()
    return reference, _alarms(reference, name)


def _alarms(reference: Reference, title: str) -> tuple[Alarm, ...]:
    """Create an alarm for each loss of the reference."""
    return tuple(
        Alarm(
            f"reference_{name}",
            partial(is_far, name),
            f"loss/{name} is far from the reference {title} (more than {TOLERANCE:.0%} and "
            f"{FLOOR} from reference/{name}). Compare data, captions, learning rate and initial "
            "weights with those of the reference.",
            POINTS,
        )
        for name in reference.losses
    )


def is_far(name: str, logged: Mapping[str, float]) -> bool:
    """Return True if a logged loss is far from its reference at this point."""
    loss, expected = logged.get(f"loss/{name}"), logged.get(f"reference/{name}")
    if loss is None or expected is None:
        return False
    return abs(loss - expected) > max(TOLERANCE * abs(expected), FLOOR)
