"""Every setting of a run, as frozen dataclasses: YAML and dotted overrides in, clear errors out."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_settings = dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))


@_settings
class VisionRecipe:
    name: str = "vit_base_patch16_224"
    """Any timm VisionTransformer by its timm name (vit_base_patch16_224, vit_large_patch16_224, ...)."""
    image_size: int = 224
    """Side of the square input in pixels; position embeddings are interpolated to it."""
    overrides: dict[str, float | int | bool] = field(default_factory=dict)
    """Further timm constructor arguments, e.g. {embed_dim: 192, depth: 6, num_heads: 3, patch_size: 8}."""
    checkpoint: str | None = None
    """Initial weights: a file (.safetensors, .pth), `timm` for timm's own pretrained weights, null for random."""
    drop_path_rate: float = 0.0
    """Stochastic depth, linear over depth (published: 0 for ViT-B, 0.1 for ViT-L)."""


@_settings
class TextRecipe:
    checkpoint: str | None = "bert-base-uncased"
    """HF BERT-type checkpoint: folder, hub name or `package:NAME` (a folder with config.json inside an
    installed Python package). Gives sizes, weights and tokenizer; null with `tokenizer` set: random weights."""
    tokenizer: str | None = None
    """Tokenizer folder, hub name or `package:NAME`; null takes the checkpoint's own."""
    layers: int | None = None
    """Number of layers; null takes the checkpoint's (its first layers when fewer)."""
    width: int = 768
    """Hidden width, used when there is no checkpoint."""
    heads: int = 12
    """Attention heads, used when there is no checkpoint."""
    mlp_width: int = 3072
    """MLP width, used when there is no checkpoint."""
    dropout: float = 0.1
    """Dropout on hidden states and on attention probabilities."""
    max_tokens: int = 30
    """Captions are truncated to this many tokens, [CLS] and [SEP] included (published: 30)."""


@_settings
class ModelRecipe:
    vision: VisionRecipe = field(default_factory=VisionRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    embed_dim: int = 256
    """Width of the contrastive space."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """Attention kernel: flash-attn varlen on GPUs that have it, SDPA elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""


@_settings
class ObjectiveRecipe:
    queue_size: int = 57600
    """Momentum features kept per modality; at least the global batch."""
    momentum: float = 0.995
    """Momentum encoders: p_m <- momentum * p_m + (1 - momentum) * p, once an optimizer step."""
    alpha: float = 0.4
    """Weight of the momentum soft targets in ITC after the ramp."""
    alpha_ramp_epochs: float = 2.0
    """Epochs over which alpha rises linearly from 0."""
    temperature: float = 0.07
    """Initial contrastive temperature (learned, clamped to [0.001, 0.5])."""
    label_smoothing: float = 0.1
    """Label smoothing of the LM loss."""
    negatives: Literal["local", "global"] = "local"
    """Pool of the ITM hard negatives: the rank's own batch (published) or the batches of all ranks."""


@_settings
class StreamRecipe:
    name: str
    """Name in logs and statistics."""
    local: str
    """Folder of the MDS shards, or the cache folder when `remote` is set. Environment variables are expanded."""
    remote: str | None = None
    """Where the shards lie: s3://bucket/prefix, another folder, ... (anything MosaicML Streaming reads)."""
    repeat: float = 1.0
    """How many times an epoch reads the stream (0.5: a different half in each epoch)."""


@_settings
class DataRecipe:
    streams: list[StreamRecipe] = field(default_factory=list)
    """Training streams; an epoch reads each of them `repeat` times, shuffled together."""
    heldout: list[StreamRecipe] = field(default_factory=list)
    """Held-out pairs for retrieval and captions; the first set is the one that is watched."""
    make_with: str = ""
    """The command that makes the data, named when it is missing."""
    min_crop_scale: float = 0.2
    """Lower end of the area of RandomResizedCrop (published: 0.2 for pretraining)."""
    flip: bool = True
    """Horizontal flip with probability one half."""
    augment: bool = True
    """RandAugment with N=2, M=5 over the published ten operations."""
    workers: int = 4
    """Loader processes a rank."""
    cache_limit: str | None = None
    """Largest size of the local cache, e.g. `200gb`; null keeps everything."""


@_settings
class OptimizerRecipe:
    peak_lr: float = 3e-4
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    warmup_steps: int = 3000
    """Linear warm-up from warmup_lr to peak_lr, within the first epoch (as published)."""
    lr_decay: float = 0.9
    """peak_lr * lr_decay ** epoch after the first epoch, never below min_lr (the code's 0.9; the paper says 0.85)."""
    weight_decay: float = 0.05
    """On every parameter, as published."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    gradient_clip: float = 0.0
    """Largest norm of the gradient over all ranks; 0 is off (published: off)."""


@_settings
class TrainRecipe:
    global_batch_size: int = 2880
    """Pairs an optimizer step, over all ranks and accumulation micro-steps."""
    micro_batch_size: int | None = None
    """Pairs a rank takes through the network at once; null: global_batch_size / ranks (no accumulation)."""
    epochs: int = 20
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    precision: Literal["fp32", "bf16"] = "bf16"
    max_nonfinite_steps: int = 10
    """Stop with a report after this many skipped steps in a row (loss or gradient not finite)."""


@_settings
class CheckpointRecipe:
    every_steps: int = 1000
    keep_last: int = 3


@_settings
class LogRecipe:
    every_steps: int = 50
    peak_tflops: float | None = None
    """Matrix-multiply peak of one rank's device for MFU; null: measured at the start."""


@_settings
class EvaluationRecipe:
    every_steps: int = 5000
    """Held-out retrieval and caption panel every so many steps, and at the end."""
    max_pairs: int = 5000
    """Pairs taken from each held-out set."""
    batch_size: int = 64
    rerank_top_k: int = 128
    """ITM re-ranks this many candidates by contrastive similarity."""
    captions: int = 8
    """Held-out images that are captioned for the panel."""
    num_beams: int = 3
    max_caption_tokens: int = 20
    min_caption_tokens: int = 5


@_settings
class Recipe:
    task: str = "pretrain"
    output_dir: str = "runs/default"
    """Checkpoints, logs, TensorBoard and summary.json."""
    seed: int = 42
    model: ModelRecipe = field(default_factory=ModelRecipe)
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
