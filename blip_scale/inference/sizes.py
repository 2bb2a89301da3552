"""Sizes of a network from its recipe, for runs, checkpoints and plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_scale.config.model_recipe import ModelRecipe
from blip_scale.config.recipe import Recipe
from blip_scale.data.tokenizer import resolve_checkpoint, special_ids
from blip_scale.interop.bert import ROBERTA
from blip_scale.model.adapters import Adapters, N, add_adapters, freeze_text
from blip_scale.model.med import MEDConfig
from blip_scale.model.text import SpecialTokens, TextConfig
from blip_scale.model.vision import VisionConfig
from blip_scale.storage import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_UNFIT = {
    "modernbert": "its layers have rotary positions, norms before the blocks and gated MLPs, which "
    "BLIP's text layers lack"
}
"""Model type of a text checkpoint -> reason why its weights cannot be used."""


@dataclass(frozen=True)
class Vocabulary:
    """Properties of a tokenizer that determine sizes of the network."""

    special: SpecialTokens
    size: int
    """Number of tokens, including [DEC] and [ENC]."""

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """Return the vocabulary of a tokenizer from `load_tokenizer`."""
        return Vocabulary(SpecialTokens(**special_ids(tokenizer)), len(tokenizer))


def med_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> MEDConfig:
    """Return the network's sizes. Text sizes are those of the text checkpoint if there is one."""
    checkpoint = recipe.model.text.checkpoint
    sizes = None if checkpoint is None else checkpoint_sizes(checkpoint)
    return network_config(recipe, sizes, Vocabulary.of(tokenizer))


def network_config(
    recipe: Recipe, text_sizes: Mapping[str, Any] | None, vocabulary: Vocabulary
) -> MEDConfig:
    """Return the sizes of a network with a text stack of these sizes.

    Args:
        recipe: recipe with all other sizes.
        text_sizes: fields of `TextConfig`, for example from `checkpoint_sizes`. None: the recipe's.
        vocabulary: vocabulary of the tokenizer.
    """
    vision, text = recipe.model.vision, recipe.model.text
    if text_sizes is None:
        text_sizes = {"width": text.width, "heads": text.heads, "mlp_width": text.mlp_width}
    layers = {} if text.layers is None else {"layers": text.layers}
    return MEDConfig(
        vision=VisionConfig(
            vision.name,
            vision.image_size,
            vision.overrides,
            vision.drop_path_rate,
            vision.patch_dropout,
            vision.frozen_layers,
            vision.frozen,
            other_sizes=tuple(stage.size for stage in recipe.data.image_sizes),
            normalization=vision.normalization,
        ),
        text=TextConfig(
            vocabulary.special,
            vocabulary.size,
            dropout=text.dropout,
            **{**text_sizes, **layers},
        ),
        embed_dim=recipe.model.embed_dim,
        temperature=recipe.objective.temperature,
        kernel=recipe.model.attention,
        gradient_checkpointing=recipe.model.gradient_checkpointing,
    )


def limited(network: N, model: ModelRecipe) -> N:
    """Freeze the text stack and add LoRA adapters, as the recipe says. Return the same network.

    `VisionConfig` freezes the image tower.

    Raises:
        ValueError: all blocks of a ViT with adapters are frozen, or peft is not installed.
    """
    if model.text.frozen:
        freeze_text(network)
    lora = model.lora
    if not lora.rank:
        return network
    adapters = Adapters(
        lora.rank,
        lora.alpha,
        tuple(lora.targets),
        lora.dropout,
        lora.also_train,
        first_block=model.vision.frozen_layers,
    )
    return add_adapters(network, adapters)


def checkpoint_sizes(checkpoint: str) -> dict[str, Any]:
    """Read the sizes of a text checkpoint as fields of `TextConfig`.

    Args:
        checkpoint: value of `model.text.checkpoint`.

    Raises:
        ValueError: the checkpoint is neither BERT nor RoBERTa, or its activation or positions
            differ from MED's.
        FileNotFoundError: the folder or package is missing, or the folder has no config.json.
    """
    from transformers import AutoConfig

    name = resolve_checkpoint(checkpoint)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        # Otherwise, transformers takes BERT-base's sizes for a folder with `bert` in its name.
        raise FileNotFoundError(
            f"model.text.checkpoint {checkpoint}: there is no config.json in {folder}; give the "
            "folder of a whole checkpoint"
        )
    is_local = hub.is_local(name, ("config.json",), "model.text.checkpoint")
    bert = AutoConfig.from_pretrained(name, local_files_only=is_local)
    if bert.model_type not in ("bert", *ROBERTA):
        reason = _UNFIT.get(
            bert.model_type, "others count positions or share layers in another way"
        )
        raise ValueError(
            f"model.text.checkpoint {checkpoint}: its model_type is {bert.model_type}; it "
            f"must be one of bert, {', '.join(ROBERTA)} ({reason})"
        )
    kind = (bert.hidden_act, getattr(bert, "position_embedding_type", "absolute"))
    if kind != ("gelu", "absolute"):
        raise ValueError(
            f"model.text.checkpoint {checkpoint}: activation {kind[0]} with {kind[1]} "
            "positions; MED has gelu and absolute positions, as BERT has: give such a checkpoint"
        )
    unused = bert.pad_token_id + 1 if bert.model_type in ROBERTA else 0
    return {
        "width": bert.hidden_size,
        "layers": bert.num_hidden_layers,
        "heads": bert.num_attention_heads,
        "mlp_width": bert.intermediate_size,
        "max_positions": bert.max_position_embeddings - unused,
        "norm_eps": bert.layer_norm_eps,
    }
