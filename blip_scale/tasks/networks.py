"""From a recipe to networks, loaders and model input: what all tasks share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip_scale import data
from blip_scale.data import normalize_images
from blip_scale.engine import collectives
from blip_scale.inference import med_config as med_config  # a part of this module's interface
from blip_scale.interop import load_bert, load_checkpoint, load_vision
from blip_scale.model import (
    MED,
    MEDConfig,
    PackedText,
    Segments,
    init_weights,
)
from blip_scale.recipe import Recipe
from blip_scale.settings import expand


def initialized_med(recipe: Recipe, config: MEDConfig) -> MED:
    """A MED on the CPU in fp32: all of it from `model.checkpoint`, else random from the seed with
    the checkpoints of ViT and text over it.

    Every rank makes the same and keeps its shards, so the start of a run does not depend on the
    ranks.
    """
    med = MED(config)
    vision, text = recipe.model.vision, recipe.model.text
    if recipe.model.checkpoint is not None:
        load_checkpoint(med, Path(expand(recipe.model.checkpoint, "model.checkpoint")))
        return med
    init_weights(med, recipe.seed, vision.init_std)
    if vision.checkpoint is not None:
        load_vision(med, vision.checkpoint)
    if text.checkpoint is not None:
        load_bert(med, data.resolve_checkpoint(text.checkpoint))
    return med


def train_loader(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, micro_batch_size: int
) -> data.TrainLoader:
    """This rank's loader."""
    position = data.LoaderPosition(
        collectives.rank(),
        collectives.world_size(),
        micro_batch_size,
        recipe.train.global_batch_size,
    )
    return data.TrainLoader(
        recipe.data,
        recipe.model.vision.image_size,
        data.CaptionInput(tokenizer, recipe.model.text.max_tokens),
        recipe.seed,
        position,
    )


def to_model_input(
    batch: data.Batch, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, PackedText]:
    """A batch on the device: images [B, 3, H, W] normalised, and its packed captions."""
    batch = batch.to(device)
    text = PackedText(batch.token_ids, Segments(batch.offsets, batch.max_length))
    return normalize_images(batch.images, dtype), text
