"""The recipe that a command was given, with the sizes of the checkpoint it starts from."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from blip_scale import launcher
from blip_scale.config import recipe as recipes
from blip_scale.config import settings
from blip_scale.config.recipe import Recipe

logger = logging.getLogger(__name__)


def warn_of_repeats(overrides: Sequence[str]) -> None:
    """Log settings that are set twice, on rank 0.

    This is not an error: job scripts append the user's settings to their own.
    """
    if launcher.rank() == 0:
        for sentence in settings.repeats(settings.parse_overrides(overrides)):
            logger.warning(sentence)


def chosen_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """Load a recipe with overrides; sizes that neither sets come from `model.checkpoint`.

    Args:
        name: a recipe's name, or the path of a YAML file.

    Raises:
        ValueError, FileNotFoundError: those of `recipe.load` and `with_sizes_of_checkpoint`.
    """
    recipes.check_overrides(overrides)
    warn_of_repeats(overrides)
    recipe = recipes.load(name, overrides)
    if recipe.model.checkpoint is None:
        return recipe
    # Imported here, because it imports transformers.
    from blip_scale.inference.starting_sizes import with_sizes_of_checkpoint

    return with_sizes_of_checkpoint(recipe, recipes.stated(name, overrides))
