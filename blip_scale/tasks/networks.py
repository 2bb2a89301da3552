"""From a recipe to networks, loaders and model input: what all tasks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from blip_scale import data
from blip_scale.data.tokenizer import special_ids
from blip_scale.engine import collectives
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
    SpecialTokens,
    TextConfig,
    VisionConfig,
    init_weights,
)
from blip_scale.recipe import Recipe, TextRecipe
from blip_scale.settings import expand


def med_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> MEDConfig:
    """Sizes of the network: the text stack's from its checkpoint where there is one."""
    vision = recipe.model.vision
    return MEDConfig(
        vision=VisionConfig(
            vision.name, vision.image_size, vision.overrides, vision.drop_path_rate
        ),
        text=_text_config(recipe.model.text, tokenizer),
        embed_dim=recipe.model.embed_dim,
        temperature=recipe.objective.temperature,
        kernel=recipe.model.attention,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
    )


def _text_config(text: TextRecipe, tokenizer: PreTrainedTokenizerFast) -> TextConfig:
    sizes: dict[str, Any] = {"width": text.width, "heads": text.heads, "mlp_width": text.mlp_width}
    layers = text.layers
    if text.checkpoint is not None:
        bert = AutoConfig.from_pretrained(data.resolve_checkpoint(text.checkpoint))
        if bert.model_type != "bert":
            raise ValueError(
                f"model.text.checkpoint {text.checkpoint}: its model_type is {bert.model_type}; it "
                "must be bert (others count positions or share layers in their own way)"
            )
        kind = (bert.hidden_act, getattr(bert, "position_embedding_type", "absolute"))
        if kind != ("gelu", "absolute"):
            raise ValueError(
                f"model.text.checkpoint {text.checkpoint}: activation {kind[0]} with {kind[1]} "
                "positions; MED has gelu and absolute positions, as BERT: take one of that kind"
            )
        sizes = {
            "width": bert.hidden_size,
            "heads": bert.num_attention_heads,
            "mlp_width": bert.intermediate_size,
            "max_positions": bert.max_position_embeddings,
            "norm_eps": bert.layer_norm_eps,
        }
        layers = layers or bert.num_hidden_layers
    return TextConfig(
        special=SpecialTokens(**special_ids(tokenizer)),
        vocab_size=len(tokenizer),
        layers=layers or 12,
        dropout=text.dropout,
        **sizes,
    )


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
    init_weights(med, recipe.seed, vision.init_std)
    if vision.checkpoint is not None:
        load_vision(med, vision.checkpoint)
    if text.checkpoint is not None:
        load_bert(med, data.resolve_checkpoint(text.checkpoint))
    return med


def initial_parameters(recipe: Recipe, config: MEDConfig, head: Head) -> dict[str, Tensor]:
    """All parameters of a head's network (`interop.heads`), whole, in fp32 on the CPU: from
    `model.checkpoint`, of this head or of pretraining, else as `initialized_med` makes them."""
    if recipe.model.checkpoint is not None:
        return head_parameters(_whole_checkpoint(recipe), head, config, recipe.seed)
    med = {name: p.detach() for name, p in initialized_med(recipe, config).named_parameters()}
    if head in OWN_NETWORKS:
        return grown(med, head, config, recipe.seed)
    return from_published(to_salesforce(med, head), head, shapes_of(head, config))


def _whole_checkpoint(recipe: Recipe) -> Path:
    assert recipe.model.checkpoint is not None
    return Path(expand(recipe.model.checkpoint, "model.checkpoint"))


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
        data.CaptionInput(tokenizer, recipe.model.text.max_tokens, prompt=recipe.model.text.prompt),
        recipe.seed,
        position,
    )


def normalize_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels uint8 [B, 3, H, W] to network input of `dtype`: CLIP's mean and deviation, as
    published."""
    mean = torch.tensor(data.IMAGE_MEAN, device=images.device).view(3, 1, 1) * 255
    deviation = torch.tensor(data.IMAGE_STD, device=images.device).view(3, 1, 1) * 255
    return ((images.float() - mean) / deviation).to(dtype)


def to_pixels(images: Tensor, med: MED) -> Tensor:
    """Pixels uint8 [B, 3, H, W] as this network takes them: on its device, in its type."""
    like = next(med.parameters())
    return normalize_images(images.to(like.device), like.dtype)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """How a generated caption starts: [DEC] and the tokens of the prompt."""
    return [special_ids(tokenizer)["dec"], *tokenizer(prompt)["input_ids"][1:-1]]


def to_model_input(
    batch: data.Batch, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, PackedText]:
    """A batch on the device: images [B, 3, H, W] normalised, and its packed captions."""
    batch = batch.to(device)
    text = PackedText(batch.token_ids, Segments(batch.offsets, batch.max_length))
    return normalize_images(batch.images, dtype), text
