"""Settings of the network: image tower, text stack, adapters and execution.

The docstring of a setting is its help text in `train.py --help`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from blip_scale.config.bounds import (
    MOST_LAYERS,
    MOST_WIDTH,
    STRICT,
    Above0,
    Count,
    Fraction,
    Layers,
    Line,
    Side,
    Width,
)


@dataclass(frozen=True, config=STRICT)
class VisionRecipe:
    """Settings of the image tower."""

    name: Line = "vit_base_patch16_224"
    """timm name of a ViT, such as vit_base_patch16_224, vit_base_patch16_siglip_224.v2_webli or
    vit_base_patch16_dinov3.lvd1689m. docs/towers.md lists the families."""
    image_size: Side = 224
    """Side of the square input image in pixels. Position embeddings are interpolated to it."""
    overrides: dict[str, float | int | bool] = field(default_factory=dict)
    """Further arguments of the timm constructor, e.g. {embed_dim: 192, depth: 6, num_heads: 3}."""
    checkpoint: Line | None = None
    """Initial weights of the ViT: a .safetensors or .pth file, `timm` for timm's pretrained
    weights, or null for random weights."""
    init_std: Above0 = 0.02
    """Standard deviation of randomly initialised linear layers (published: 0.02, for width 768). A
    narrow ViT learns faster with about 1 / sqrt(width)."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth rate of the last block; it rises linearly over the blocks (published: 0 for
    ViT-B, 0.1 for ViT-L)."""
    patch_dropout: Fraction = 0.0
    """Share of the patches that the ViT drops in training, drawn anew for each image. Momentum
    encoders and evaluation see all patches. Changes the mathematics; not in the paper."""
    frozen_layers: Count = 0
    """Number of first ViT blocks to freeze, together with the patch and position embeddings. Meant
    for a pretrained ViT. Changes the mathematics; not in the paper."""
    frozen: bool = False
    """Freeze the whole image tower, which needs pretrained weights. Not in the paper."""
    normalization: Literal["auto", "blip", "tower"] = "auto"
    """Mean and standard deviation of the pixels: BLIP's, or those of the tower's timm weights. auto
    uses BLIP's for vit_SIZE_patchP_N and deit_SIZE_patchP_N, as published, and the tower's for all
    others."""

    @field_validator("overrides")
    @classmethod
    def _bounded(cls, values: dict[str, float | int | bool]) -> dict[str, float | int | bool]:
        for name, value in values.items():
            most = MOST_LAYERS if name == "depth" else MOST_WIDTH
            if abs(value) > most:
                raise ValueError(f"{name}: {value}: expected at most {most}")
        return values


@dataclass(frozen=True, config=STRICT)
class TextRecipe:
    """Settings of tokenizer and text stack."""

    checkpoint: Line | None = "bert-base-uncased"
    """Hugging Face checkpoint of BERT, RoBERTa or XLM-R that gives sizes, weights and tokenizer: a
    folder, a hub name, or `package:NAME` for a folder with config.json in an installed Python
    package. null: random weights, which needs model.text.tokenizer."""
    tokenizer: Line | None = None
    """Tokenizer: a folder, a hub name or `package:NAME`. null: the tokenizer of
    model.text.checkpoint."""
    layers: Layers | None = None
    """Number of layers. With fewer layers than the checkpoint has, its first layers are used. null:
    as many as the checkpoint has."""
    width: Width = 768
    """Hidden width, if there is no checkpoint."""
    heads: Width = 12
    """Number of attention heads, if there is no checkpoint."""
    mlp_width: Width = 3072
    """Hidden width of the MLP, if there is no checkpoint."""
    dropout: Fraction = 0.1
    """Dropout rate of hidden states and attention probabilities."""
    init_std: Above0 = 0.02
    """Standard deviation of randomly initialised linear layers (BERT: 0.02)."""
    max_tokens: Annotated[int, Field(ge=3, le=MOST_WIDTH)] = 30
    """Largest number of tokens in a caption, [CLS] and [SEP] included. Longer captions are
    truncated (published: 30, 35 for retrieval, 40 for captioning)."""
    max_words: Width | None = None
    """Largest number of words in a caption; raise it together with max_tokens for long captions.
    null: as published (30; 40 for NLVR2, 50 for questions)."""
    truncation: Literal["published", "sentence"] = "published"
    """End of a caption with too many words or tokens. `published`: the last word or token that
    fits. `sentence`: the last whole sentence that fits, or as published if the first one does not
    fit; shards need captions with punctuation (`prepare-data --raw-captions`, overlays)."""
    frozen: bool = False
    """Freeze embeddings, self-attentions and MLPs of the text stack, which needs pretrained
    weights. Cross-attention is still trained. Not in the paper."""
    prompt: str = ""
    """Text at the start of every training caption and every generated caption. It is excluded from
    the loss (published for captioning: `a picture of `)."""


@dataclass(frozen=True, config=STRICT)
class LoraRecipe:
    """Settings of LoRA adapters (docs/tasks.md). They need pretrained weights, and the package
    peft. Exports hold the adapters merged into the weights."""

    rank: Annotated[int, Field(ge=0, le=MOST_WIDTH)] = 0
    """Rank of the adapters, e.g. 8. 0: no adapters, and all weights are trained."""
    alpha: Above0 = 16.0
    """Numerator of the factor alpha / rank by which adapters are scaled."""
    targets: list[Literal["vision", "text", "cross_attention"]] = field(
        default_factory=lambda: ["vision", "text", "cross_attention"]
    )
    """Parts whose attention gets adapters: image tower, self-attention of the text stack,
    cross-attention. All other weights of these parts are frozen."""
    dropout: Fraction = 0.0
    """Dropout rate of the adapters' input."""
    also_train: Literal["heads", "rest", "none"] = "heads"
    """Weights that are trained besides the adapters. `heads`: all weights outside the image tower
    and the text stack (projections, temperature, matching head, LM head without word embeddings,
    classifiers), and layers without matching pretrained weights. `rest`: also the parts that are
    not targets. `none`: only the adapters."""


@dataclass(frozen=True, config=STRICT)
class ModelRecipe:
    """Settings of the network and its execution."""

    vision: VisionRecipe = field(default_factory=VisionRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    checkpoint: Line | None = None
    """Initial weights of the whole network: a training checkpoint (step_N, or the folder of a run),
    a BLIP .pth file, or a Hugging Face folder. They replace the weights of model.vision.checkpoint
    and model.text.checkpoint; sizes and tokenizer still come from these settings."""
    embed_dim: Width = 256
    """Width of the contrastive embeddings."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """Attention kernel. auto: FlashAttention if it is installed and the GPU supports it, else
    PyTorch's SDPA."""
    gradient_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass. Saves memory, but takes about a third
    more time."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Capture forward and backward of a micro-step as one CUDA graph. auto: on CUDA, if weights
    stay whole between the passes and no shape depends on the data. If not, the log gives the
    reason."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the ViT blocks and text layers with torch.compile. Needs weights that stay whole
    between the passes. auto: on a GPU, for pretraining and retrieval, whose shapes are static
    there."""
