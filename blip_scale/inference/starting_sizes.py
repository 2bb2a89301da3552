"""A recipe that starts from a checkpoint takes the network's sizes and tokenizer from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip_scale.config.recipe import ModelRecipe, Recipe, TextRecipe, VisionRecipe
from blip_scale.config.settings import expand
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.loading import PUBLISHED_TOKENIZER, recipe_of, tokenizer_beside
from blip_scale.inference.sizes import med_config
from blip_scale.interop.checkpoints import differences, format_of, sizes_of
from blip_scale.model.med import MEDConfig

_VISION = "model.vision.overrides"
_SETTINGS = {
    "vision width": f"{_VISION}.embed_dim",
    "vision blocks": f"{_VISION}.depth",
    "vision heads": f"{_VISION}.num_heads",
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
        FileNotFoundError: the checkpoint lacks a part.
    """
    if recipe.model.checkpoint is None:
        return recipe
    path = Path(expand(recipe.model.checkpoint, "model.checkpoint"))
    if not path.exists():
        return recipe
    source = recipe_of(path, format_of(path), None)
    if source is not None:  # of a run
        config = med_config(source, load_tokenizer(source.model.text))
        model = source.model
    else:
        found = sizes_of(path)
        assert found is not None
        config = found
        model = _as_recipe(config, path)
    recipe = replace(recipe, model=_filled(recipe.model, model, config, stated))
    _check_sizes(recipe, config, path)
    return recipe


def _as_recipe(config: MEDConfig, path: Path) -> ModelRecipe:
    """ViT and tokenizer of a network as settings; the tokenizer is the one beside the checkpoint,
    else the published one."""
    vision = config.vision
    return ModelRecipe(
        VisionRecipe(vision.name, vision.image_size, dict(vision.overrides)),
        TextRecipe(checkpoint=None, tokenizer=tokenizer_beside(path) or PUBLISHED_TOKENIZER),
    )


def _filled(
    model: ModelRecipe, source: ModelRecipe, config: MEDConfig, stated: Collection[str]
) -> ModelRecipe:
    """`model` with what nobody stated from the checkpoint: ViT and tokenizer as `source` says them,
    sizes of `config`. What belongs together is taken together: a ViT's name and overrides, a BERT
    and its tokenizer."""

    def unstated(section: str, *names: str) -> bool:
        return not any(f"model.{section}{name}" in stated for name in names)

    vision, text = source.vision, source.text
    of_vision: dict[str, Any] = {}
    is_vit_open = unstated("vision.", "name", "overrides")
    if is_vit_open and not any(name.startswith(f"{_VISION}.") for name in stated):
        of_vision |= {"name": vision.name, "overrides": vision.overrides}
    if unstated("vision.", "image_size"):
        of_vision["image_size"] = vision.image_size
    sizes = ("layers", "width", "heads", "mlp_width")
    of_text = {name: getattr(config.text, name) for name in sizes if unstated("text.", name)}
    if unstated("text.", "checkpoint"):
        of_text["checkpoint"] = text.checkpoint
    if unstated("text.", "tokenizer") and (
        unstated("text.", "checkpoint") or model.text.checkpoint is None
    ):
        of_text["tokenizer"] = text.tokenizer or text.checkpoint
    embed_dim = config.embed_dim if unstated("", "embed_dim") else model.embed_dim
    return replace(
        model,
        vision=replace(model.vision, **of_vision),
        text=replace(model.text, **of_text),
        embed_dim=embed_dim,
    )


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
