"""Load the recipe given to a command, with missing sizes taken from its initial checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from blip_scale import launcher
from blip_scale.config import recipe as recipes
from blip_scale.config import settings
from blip_scale.config.recipe import Recipe

logger = logging.getLogger(__name__)


def warn_of_repeats(overrides: Sequence[str]) -> None:
    """Log, on rank 0, the settings that are set more than once.

    This is not an error: job scripts append the user's settings to the script's settings.
    """
    if launcher.rank() == 0:
        for sentence in settings.repeats(settings.parse_overrides(overrides)):
            logger.warning(sentence)


def chosen_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """Load a recipe and apply overrides.

    Sizes that neither the recipe nor an override sets come from `model.checkpoint`.

    Args:
        name: name of a recipe, or path of a YAML file.
        overrides: settings from the command line.

    Raises:
        ValueError, FileNotFoundError: see `recipe.load` and `with_sizes_of_checkpoint`.
    """
    recipes.check_overrides(overrides)
    warn_of_repeats(overrides)
    recipe = recipes.load(name, overrides)
    if recipe.model.checkpoint is None:
        return recipe
    # Imported late: this module imports transformers, which is slow.
    from blip_scale.inference.starting_sizes import with_sizes_of_checkpoint

    return with_sizes_of_checkpoint(recipe, recipes.stated(name, overrides))
