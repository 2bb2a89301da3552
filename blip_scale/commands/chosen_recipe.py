"""The recipe that a training command was given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe


def chosen_recipe(options: argparse.Namespace, overrides: Sequence[str]) -> Recipe:
    """`options.recipe` with overrides on top, and what they don't say of the network taken from
    `model.checkpoint`; with `options.print_recipe` as it is written.

    Raises:
        ValueError, FileNotFoundError: as `recipe.load` and `with_sizes_of_checkpoint`.
    """
    recipes.check_overrides(overrides)
    recipe = recipes.load(options.recipe, overrides)
    if recipe.model.checkpoint is None or options.print_recipe:
        return recipe
    # Imported here, because it takes transformers.
    from blip_scale.inference.starting_sizes import with_sizes_of_checkpoint

    return with_sizes_of_checkpoint(recipe, recipes.stated(options.recipe, overrides))
