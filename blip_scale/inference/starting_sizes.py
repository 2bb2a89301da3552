"""Sizes and tokenizer of a network, from the checkpoint with which its recipe starts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from blip_scale.config.model_recipe import ModelRecipe, TextRecipe, VisionRecipe
from blip_scale.config.recipe import Recipe
from blip_scale.config.settings import expand
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.loading import PUBLISHED_TOKENIZER, recipe_of, tokenizer_beside
from blip_scale.inference.sizes import med_config
from blip_scale.interop.checkpoints import differences, format_of, sizes_of
from blip_scale.interop.salesforce_files import UnknownSizesError
from blip_scale.model.med import MEDConfig

_VISION = "model.vision.overrides"
_SETTINGS = {
    "vision tower": "model.vision.name",
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
"""Name of a size in `differences` -> setting that determines it."""
_TEXT_SIZES = ("layers", "width", "heads", "mlp_width")
_FROM_CHECKPOINT = (
    "vision.name",
    "vision.overrides",
    "vision.image_size",
    "vision.normalization",
    "text.checkpoint",
    "text.tokenizer",
    *(f"text.{name}" for name in _TEXT_SIZES),
    "embed_dim",
)
"""Settings of `model` that can be taken from a checkpoint."""
_OF_TEXT_CHECKPOINT = {"text width", "text heads", "text MLP width"}
"""Sizes that come from model.text.checkpoint if it is set."""


def with_sizes_of_checkpoint(recipe: Recipe, stated: Collection[str]) -> Recipe:
    """Fill the open settings of a recipe from `model.checkpoint`.

    These are ViT, image size, text stack, tokenizer and contrastive width.

    Args:
        recipe: recipe to fill. It is returned unchanged if `model.checkpoint` is not set or does
            not exist.
        stated: dotted names of the settings that the user gave (`recipe.stated`).

    Raises:
        ValueError: the recipe's sizes differ from the checkpoint's. The message names the settings
            and both values.
    """
    if recipe.model.checkpoint is None:
        return recipe
    path = Path(expand(recipe.model.checkpoint, "model.checkpoint"))
    if not path.exists():
        return recipe
    try:
        source, config = _source(path)
    except (UnknownSizesError, FileNotFoundError):  # the recipe must give all sizes
        return recipe
    recipe = replace(recipe, model=_filled(recipe.model, source, stated))
    if config is not None:
        _check_sizes(recipe, config, path)
    return recipe


def _source(path: Path) -> tuple[ModelRecipe, MEDConfig | None]:
    """Read the settings of a checkpoint's network, and its sizes.

    The sizes are None if they depend on the tokenizer of a run which cannot be loaded here.

    Raises:
        UnknownSizesError, FileNotFoundError: no file gives the sizes.
    """
    config = sizes_of(path)
    if config is not None:
        tokenizer = tokenizer_beside(path) or PUBLISHED_TOKENIZER
        vision = config.vision
        model = ModelRecipe(
            VisionRecipe(
                vision.name,
                vision.image_size,
                dict(vision.overrides),
                normalization=vision.normalization,
            ),
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
    """Replace the settings of `model` that the user did not state by those of `source`.

    A ViT's name and overrides are replaced only together, and so are a BERT and its tokenizer.
    """
    vision, text = model.vision, model.text
    open_names = {name for name in _FROM_CHECKPOINT if f"model.{name}" not in stated}
    is_vit_stated = any(name.startswith(f"{_VISION}.") for name in stated)
    if {"vision.name", "vision.overrides"} <= open_names and not is_vit_stated:
        vision = replace(vision, name=source.vision.name, overrides=source.vision.overrides)
    if "vision.image_size" in open_names:
        vision = replace(vision, image_size=source.vision.image_size)
    if "vision.normalization" in open_names:
        vision = replace(vision, normalization=source.vision.normalization)
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
    """Raise ValueError if the recipe's network differs from the checkpoint's."""
    text = recipe.model.text
    differing = differences(med_config(recipe, load_tokenizer(text)), config)
    if "vocabulary" in differing:
        differing.pop("special tokens", None)  # their ids depend on the vocabulary size
    faults = []
    for name, (here, there) in differing.items():
        setting = _SETTINGS[name]
        if name in _OF_TEXT_CHECKPOINT and text.checkpoint is not None:
            setting = "model.text.checkpoint"
        if name == "vocabulary" and text.tokenizer is None:
            setting = "model.text.checkpoint"
        faults.append(f"{setting} gives {name} {here}, the checkpoint has {there}")
    if faults:
        raise ValueError(
            f"model.checkpoint {path} holds another network than the recipe's: "
            f"{'; '.join(faults)}. Leave these settings out to take them from the checkpoint, or "
            "give another checkpoint"
        )
