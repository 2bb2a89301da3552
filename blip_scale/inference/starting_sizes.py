"""A recipe that starts from a checkpoint takes the network's sizes and tokenizer from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from blip_scale.config.recipe import ModelRecipe, Recipe, TextRecipe, VisionRecipe
from blip_scale.config.settings import expand
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.loading import PUBLISHED_TOKENIZER, recipe_of, tokenizer_beside
from blip_scale.inference.sizes import med_config
from blip_scale.interop.checkpoints import differences, format_of, sizes_of
from blip_scale.interop.salesforce_files import UnknownSizesError
from blip_scale.model.med import MEDConfig

_VISION = "model.vision.overrides"
_SETTINGS = {
    "vision width": f"{_VISION}.embed_dim",
    "vision blocks": f"{_VISION}.depth",
    "vision heads": f"{_VISION}.num_heads",
    "vision MLP width": f"{_VISION}.mlp_ratio",
    "patch size": f"{_VISION}.patch_size",
    "text width": "model.text.width",
    "text layers": "model.text.layers",
    "text heads": "model.text.heads",
    "text MLP width": "model.text.mlp_width",
    "positions": "model.text.checkpoint",
    "vocabulary": "model.text.tokenizer",
    "special tokens": "model.text.tokenizer",
    "norm eps": "model.text.checkpoint",
    "embed_dim": "model.embed_dim",
}
"""What `differences` calls a size -> the setting that says it."""
_TEXT_SIZES = ("layers", "width", "heads", "mlp_width")
_TAKEN = (
    "vision.name",
    "vision.overrides",
    "vision.image_size",
    "text.checkpoint",
    "text.tokenizer",
    *(f"text.{name}" for name in _TEXT_SIZES),
    "embed_dim",
)
"""Settings of `model` that a checkpoint can say."""
_OF_CHECKPOINT = {"text width", "text heads", "text MLP width"}
"""Sizes that model.text.checkpoint says where it is given."""


def with_sizes_of_checkpoint(recipe: Recipe, stated: Collection[str]) -> Recipe:
    """The recipe with what it doesn't say of its network taken from `model.checkpoint`: ViT, image
    size, text stack, tokenizer and contrastive width.

    Args:
        recipe: one without `model.checkpoint`, or whose checkpoint isn't there, is returned as it
            is.
        stated: dotted names of the settings that the user gave (`recipe.stated`).

    Raises:
        ValueError: the recipe gives sizes that the checkpoint hasn't; names the settings and both
            values.
    """
    if recipe.model.checkpoint is None:
        return recipe
    path = Path(expand(recipe.model.checkpoint, "model.checkpoint"))
    if not path.exists():
        return recipe
    try:
        source, config = _source(path)
    except (UnknownSizesError, FileNotFoundError):  # then the recipe must say everything
        return recipe
    recipe = replace(recipe, model=_filled(recipe.model, source, stated))
    if config is not None:
        _check_sizes(recipe, config, path)
    return recipe


def _source(path: Path) -> tuple[ModelRecipe, MEDConfig | None]:
    """A checkpoint's network as settings, and its sizes; None where they hang on the tokenizer of a
    run that isn't at hand here.

    Raises:
        UnknownSizesError, FileNotFoundError: nothing says the sizes.
    """
    config = sizes_of(path)
    if config is not None:
        tokenizer = tokenizer_beside(path) or PUBLISHED_TOKENIZER
        vision = config.vision
        model = ModelRecipe(
            VisionRecipe(vision.name, vision.image_size, dict(vision.overrides)),
            TextRecipe(checkpoint=None, tokenizer=tokenizer),
            embed_dim=config.embed_dim,
        )
    else:
        run = recipe_of(path, format_of(path), None)
        assert run is not None
        model = run.model
        try:
            config = med_config(run, load_tokenizer(model.text))
        except (OSError, ValueError):
            return model, None
    sizes = {name: getattr(config.text, name) for name in _TEXT_SIZES}
    return replace(model, text=replace(model.text, **sizes)), config


def _filled(model: ModelRecipe, source: ModelRecipe, stated: Collection[str]) -> ModelRecipe:
    """`model` with the settings of `source` that nobody stated. What belongs together is taken
    together: a ViT's name and overrides, a BERT and its tokenizer."""
    vision, text = model.vision, model.text
    open_names = {name for name in _TAKEN if f"model.{name}" not in stated}
    is_vit_stated = any(name.startswith(f"{_VISION}.") for name in stated)
    if {"vision.name", "vision.overrides"} <= open_names and not is_vit_stated:
        vision = replace(vision, name=source.vision.name, overrides=source.vision.overrides)
    if "vision.image_size" in open_names:
        vision = replace(vision, image_size=source.vision.image_size)
    for name in _TEXT_SIZES:
        if f"text.{name}" in open_names:
            text = replace(text, **{name: getattr(source.text, name)})
    if "text.checkpoint" in open_names:
        text = replace(text, checkpoint=source.text.checkpoint)
    if "text.tokenizer" in open_names and (
        "text.checkpoint" in open_names or text.checkpoint is None
    ):
        text = replace(text, tokenizer=source.text.tokenizer or source.text.checkpoint)
    embed_dim = source.embed_dim if "embed_dim" in open_names else model.embed_dim
    return replace(model, vision=vision, text=text, embed_dim=embed_dim)


def _check_sizes(recipe: Recipe, config: MEDConfig, path: Path) -> None:
    """Refuse a recipe whose network isn't that of the checkpoint."""
    text = recipe.model.text
    differing = differences(med_config(recipe, load_tokenizer(text)), config)
    if "vocabulary" in differing:
        differing.pop("special tokens", None)  # they follow the words
    faults = []
    for name, (here, there) in differing.items():
        setting = _SETTINGS[name]
        if name in _OF_CHECKPOINT and text.checkpoint is not None:
            setting = "model.text.checkpoint"
        if name == "vocabulary" and text.tokenizer is None:
            setting = "model.text.checkpoint"
        faults.append(f"{setting} gives {name} {here}, the checkpoint has {there}")
    if faults:
        raise ValueError(
            f"model.checkpoint {path} is of another network than the recipe's: "
            f"{'; '.join(faults)}. Leave these settings out, and they are taken from the "
            "checkpoint; or give another checkpoint"
        )
