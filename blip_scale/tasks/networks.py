"""Networks, initial weights and loaders from a recipe, for all tasks."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blip_scale import logs
from blip_scale.config.recipe import Recipe
from blip_scale.config.settings import expand
from blip_scale.data.loading.loader import TrainLoader
from blip_scale.data.loading.micro_batches import CaptionInput, LoaderPosition
from blip_scale.data.tokenizer import resolve_checkpoint
from blip_scale.engine import collectives
from blip_scale.interop.bert import load_bert
from blip_scale.interop.checkpoints import grown, head_parameters, load_checkpoint
from blip_scale.interop.heads import PREFIX
from blip_scale.interop.vision import load_vision
from blip_scale.model.heads import OWN_NETWORKS, Head, cut_down
from blip_scale.model.initialization import init_weights, seeded
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.vision import build_vision, training_tokens


def initialized_med(recipe: Recipe, config: MEDConfig) -> MED:
    """Create a MED on the CPU in fp32, from `model.checkpoint` or from the seed.

    Without `model.checkpoint`, draw the weights from the seed, then load the checkpoints of ViT
    and text if the recipe gives them. Every rank creates equal weights and keeps its slices, so
    the initial weights do not depend on the number of ranks.
    """
    med = seeded(lambda: MED(config), recipe.seed)
    vision, text = recipe.model.vision, recipe.model.text
    if recipe.model.checkpoint is not None:
        load_checkpoint(med, _whole_checkpoint(recipe))
        return med
    init_weights(med, recipe.seed, vision.init_std, text.init_std)
    if vision.checkpoint is not None:
        load_vision(med, vision.checkpoint)
    if text.checkpoint is not None:
        load_bert(med, resolve_checkpoint(text.checkpoint))
    return med


def initial_parameters(
    recipe: Recipe, config: MEDConfig, head: Head, frozen: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return all parameters of a head's network by full name, whole, in fp32 on the CPU.

    They come from `model.checkpoint`, which may be of this head (`model.heads`) or of pretraining.
    Without it, they come from `initialized_med`.

    Raises:
        ValueError: a parameter in `frozen` would be random; see `interop.checkpoints.grown`.
    """
    std = recipe.model.text.init_std
    if recipe.model.checkpoint is not None:
        return head_parameters(_whole_checkpoint(recipe), head, config, recipe.seed, std, frozen)
    med = initialized_med(recipe, config)
    if head in OWN_NETWORKS:
        return grown(dict(med.named_parameters()), head, config, recipe.seed, std, frozen)
    network = cut_down(med, head)
    return {f"{PREFIX}{name}": parameter.detach() for name, parameter in network.named_parameters()}


def _whole_checkpoint(recipe: Recipe) -> Path:
    assert recipe.model.checkpoint is not None
    return Path(expand(recipe.model.checkpoint, "model.checkpoint"))


def train_loader(recipe: Recipe, text: CaptionInput, micro_batch_size: int) -> TrainLoader:
    """Create this rank's loader of training batches."""
    position = LoaderPosition(
        collectives.rank(),
        collectives.world_size(),
        micro_batch_size,
        recipe.train.global_batch_size,
    )
    return TrainLoader(
        recipe.data,
        recipe.model.vision.image_size,
        text,
        recipe.seed,
        position,
        partial(logs.set_up_worker, Path(recipe.output_dir), position.rank),
    )


def image_shape(config: MEDConfig) -> tuple[int, int]:
    """Return the number of tokens of a training image, and their width."""
    with torch.device("meta"):
        vision = build_vision(config.vision)
    return training_tokens(vision), vision.embed_dim
