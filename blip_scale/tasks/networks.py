"""From a recipe to networks, loaders and model input: what all tasks share."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from blip_scale import data, logs
from blip_scale.data import normalize_images
from blip_scale.engine import collectives
from blip_scale.inference import med_config as med_config  # a part of this module's interface
from blip_scale.interop import (
    OWN_NETWORKS,
    Head,
    from_published,
    grown,
    head_parameters,
    load_bert,
    load_checkpoint,
    load_vision,
    shapes_of,
    to_salesforce,
)
from blip_scale.model import (
    MED,
    MEDConfig,
    PackedText,
    Segments,
    build_vision,
    init_weights,
    training_tokens,
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
        load_checkpoint(med, _whole_checkpoint(recipe))
        return med
    init_weights(med, recipe.seed, vision.init_std, text.init_std)
    if vision.checkpoint is not None:
        load_vision(med, vision.checkpoint)
    if text.checkpoint is not None:
        load_bert(med, data.resolve_checkpoint(text.checkpoint))
    return med


def initial_parameters(recipe: Recipe, config: MEDConfig, head: Head) -> dict[str, Tensor]:
    """All parameters of a head's network (`interop.heads`), whole, in fp32 on the CPU: from
    `model.checkpoint`, of this head or of pretraining, else as `initialized_med` makes them."""
    std = recipe.model.text.init_std
    if recipe.model.checkpoint is not None:
        return head_parameters(_whole_checkpoint(recipe), head, config, recipe.seed, std)
    med = {name: p.detach() for name, p in initialized_med(recipe, config).named_parameters()}
    if head in OWN_NETWORKS:
        return grown(med, head, config, recipe.seed, std)
    return from_published(to_salesforce(med, head), head, shapes_of(head, config))


def _whole_checkpoint(recipe: Recipe) -> Path:
    assert recipe.model.checkpoint is not None
    return Path(expand(recipe.model.checkpoint, "model.checkpoint"))


def train_loader(
    recipe: Recipe, text: data.CaptionInput, micro_batch_size: int
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
        text,
        recipe.seed,
        position,
        partial(logs.set_up, Path(recipe.output_dir), position.rank),
    )


def to_pixels(images: Tensor, med: nn.Module) -> Tensor:
    """Pixels uint8 [B, 3, H, W] as this network takes them: on its device, in its type."""
    like = next(med.parameters())
    return normalize_images(images.to(like.device), like.dtype)


def packed_text(packed: data.PackedTokens, device: torch.device) -> PackedText:
    """Packed token ids as the network takes them."""
    return PackedText(packed.token_ids, Segments(packed.offsets, packed.max_length)).to(device)


def image_shape(config: MEDConfig) -> tuple[int, int]:
    """Tokens of an image in training, and their width."""
    with torch.device("meta"):
        vision = build_vision(config.vision)
    return training_tokens(vision), vision.embed_dim


def to_model_input(
    batch: data.Batch, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, PackedText]:
    """A batch on the device: images [B, 3, H, W] normalised, and its packed captions."""
    batch = batch.to(device)
    text = PackedText(batch.token_ids, Segments(batch.offsets, batch.max_length))
    return normalize_images(batch.images, dtype), text
