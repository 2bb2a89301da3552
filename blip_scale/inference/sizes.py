"""The sizes of a recipe's network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blip_scale.config.recipe import Recipe, TextRecipe
from blip_scale.data.tokenizer import resolve_checkpoint, special_ids
from blip_scale.model.med import MEDConfig
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig
from blip_scale.storage import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def med_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> MEDConfig:
    """Sizes of the network: the text stack's from its checkpoint where there is one."""
    vision = recipe.model.vision
    return MEDConfig(
        vision=VisionConfig(
            vision.name,
            vision.image_size,
            vision.overrides,
            vision.drop_path_rate,
            vision.patch_dropout,
            vision.frozen_layers,
        ),
        text=_text_config(recipe.model.text, tokenizer),
        embed_dim=recipe.model.embed_dim,
        temperature=recipe.objective.temperature,
        kernel=recipe.model.attention,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
    )


def _text_config(text: TextRecipe, tokenizer: PreTrainedTokenizerFast) -> TextConfig:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"width": text.width, "heads": text.heads, "mlp_width": text.mlp_width}
    layers = text.layers
    if text.checkpoint is not None:
        place = resolve_checkpoint(text.checkpoint)
        is_local = hub.is_local(place, ("config.json",), "model.text.checkpoint")
        bert = AutoConfig.from_pretrained(place, local_files_only=is_local)
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
