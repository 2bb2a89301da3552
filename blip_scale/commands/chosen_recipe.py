"""Load the recipe of a training command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe


def chosen_recipe(options: argparse.Namespace, overrides: Sequence[str]) -> Recipe:
    """Load `options.recipe` with overrides.

    Sizes of the network that they leave out are taken from `model.checkpoint`. With
    `options.print_recipe` the recipe is returned as written.

    Raises:
        ValueError, FileNotFoundError: see `recipe.load` and `with_sizes_of_checkpoint`.
    """
    recipes.check_overrides(overrides)
    recipe = recipes.load(options.recipe, overrides)
    if recipe.model.checkpoint is None or options.print_recipe:
        return recipe
    # Imported here, because it imports transformers.
    from blip_scale.inference.starting_sizes import with_sizes_of_checkpoint

    return with_sizes_of_checkpoint(recipe, recipes.stated(options.recipe, overrides))
