"""Every setting of a run, as frozen dataclasses: YAML and dotted overrides in, clear errors out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from blip_scale.config import settings

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
"""Folder of the recipes that come with the package."""

MAX_PIXELS = 89_478_485
"""Default of the largest image; Pillow warns above it."""

FP16_REFUSED = (
    "fp16 is not offered: losses over queue and vocabulary leave its range (users saw an LM loss "
    "of INF); bf16 has the range of fp32 and costs the same"
)

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Above0 = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=_STRICT)
class VisionRecipe:
    name: str = "vit_base_patch16_224"
    """Any timm VisionTransformer by its name there: vit_base_patch16_224, deit_base_patch16_224."""
    image_size: Positive = 224
    """Side of the square input in pixels; position embeddings are interpolated to it."""
    overrides: dict[str, float | int | bool] = field(default_factory=dict)
    """Further timm constructor arguments, e.g. {embed_dim: 192, depth: 6, num_heads: 3}."""
    checkpoint: str | None = None
    """Initial weights: a file (.safetensors, .pth), `timm` for timm's own pretrained weights, null
    for random."""
    init_std: Above0 = 0.02
    """Deviation of the random start of its linear layers (published: 0.02, made for width 768; a
    narrow ViT learns sooner from about 1 / sqrt(width))."""
    drop_path_rate: Fraction = 0.0
    """Stochastic depth, linear over depth (published: 0 for ViT-B, 0.1 for ViT-L)."""
    patch_dropout: Fraction = 0.0
    """Share of the patches that the ViT leaves out in training, drawn anew for each image; momentum
    encoders and evaluation see all. Changes the mathematics; not in the paper."""
    frozen_layers: Count = 0
    """So many first blocks of the ViT keep their initial weights, with patch and position
    embeddings: for a ViT that was trained before. Changes the mathematics; not in the paper."""


@dataclass(frozen=True, config=_STRICT)
class TextRecipe:
    checkpoint: str | None = "bert-base-uncased"
    """HF BERT-type checkpoint: folder, hub name or `package:NAME` (a folder with config.json inside
    an installed Python package). Gives sizes, weights and tokenizer; null with `tokenizer` set:
    random weights."""
    tokenizer: str | None = None
    """Tokenizer folder, hub name or `package:NAME`; null takes the checkpoint's own."""
    layers: Positive | None = None
    """Number of layers; null takes the checkpoint's (its first layers when fewer)."""
    width: Positive = 768
    """Hidden width, used when there is no checkpoint."""
    heads: Positive = 12
    """Attention heads, used when there is no checkpoint."""
    mlp_width: Positive = 3072
    """MLP width, used when there is no checkpoint."""
    dropout: Fraction = 0.1
    """Dropout on hidden states and on attention probabilities."""
    init_std: Above0 = 0.02
    """As the ViT's, of linear layers."""
    max_tokens: Annotated[int, Field(ge=3)] = 30
    """Captions are truncated to this many tokens, [CLS] and [SEP] included (published: 30, 35 for
    retrieval, 40 for captioning)."""
    prompt: str = ""
    """How every caption begins, in training (outside of the loss) and when one is generated
    (published for captioning: `a picture of `)."""


@dataclass(frozen=True, config=_STRICT)
class ModelRecipe:
    vision: VisionRecipe = field(default_factory=VisionRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    checkpoint: str | None = None
    """Initial weights of the whole network: a training checkpoint (step_N, or the folder of a run),
    BLIP's .pth, or a Hugging Face folder. It wins over the weights of model.vision.checkpoint and
    model.text.checkpoint; sizes and tokenizer still come from these settings."""
    embed_dim: Positive = 256
    """Width of the contrastive space."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """Attention kernel. auto takes FlashAttention where the GPU has it, and SDPA elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Capture forward and backward of a micro-step as one CUDA graph: auto does it on CUDA where
    weights stay whole between the passes and no shape depends on the data; the log says why not."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile for the ViT's blocks and the text layers, where weights stay whole between the
    passes. auto: on a GPU, for pretraining and retrieval, whose shapes are static there."""


@dataclass(frozen=True, config=_STRICT)
class ObjectiveRecipe:
    itc: str = "momentum"
    """Image-text contrastive loss, a name of blip_scale.tasks.contrastive_task.CONTRASTS:
    `momentum` is BLIP's, with momentum encoders, feature queues and soft targets. queue_size,
    momentum, alpha and alpha_ramp_epochs are its settings."""
    queue_size: Positive = 57600
    """Momentum features kept per modality; at least the global batch."""
    momentum: Share = 0.995
    """Momentum encoders: p_m <- momentum * p_m + (1 - momentum) * p, once an optimizer step."""
    alpha: Share = 0.4
    """Weight of the momentum soft targets in ITC after the ramp."""
    alpha_ramp_epochs: Rate = 2.0
    """Epochs over which alpha rises linearly from 0."""
    temperature: Annotated[float, Field(ge=0.001, le=0.5)] = 0.07
    """Initial contrastive temperature (learned, clamped to [0.001, 0.5])."""
    label_smoothing: Fraction = 0.1
    """Label smoothing of the LM loss."""
    false_answers: Positive = 2
    """VisDial: so many false candidates are seen with each true answer (ITM has two negatives for
    a pair)."""
    negatives: Literal["local", "global"] = "local"
    """Pool of the ITM hard negatives: the rank's own batch (published) or the batches of all
    ranks."""


@dataclass(frozen=True, config=_STRICT)
class StreamRecipe:
    name: str
    """Name in logs and statistics."""
    local: str
    """Folder of the MDS shards, or the cache folder when `remote` is set. Environment variables are
    expanded."""
    remote: str | None = None
    """Where the shards lie: another folder, or s3://, gs://, az:// or https:// with a prefix."""
    repeat: Above0 | Literal["captions"] | None = None
    """How many times an epoch reads the stream (0.5: a different half in each epoch); an image with
    several captions gives another one each time. `captions`: each image as often as it has
    captions, each caption once. Instead, one of the next two can be given; null without them:
    once."""
    samples_per_epoch: Positive | None = None
    """So many samples an epoch takes from the stream, going on where the epoch before stopped."""
    weight: Above0 | None = None
    """The stream's part of `data.samples_per_epoch`, in relation to the weights of the others; then
    all streams have one."""


@dataclass(frozen=True, config=_STRICT)
class DataRecipe:
    streams: list[StreamRecipe] = field(default_factory=list)
    """Training streams; an epoch takes its part of each of them, shuffled together."""
    samples_per_epoch: Positive | None = None
    """Samples of an epoch where streams have weights; null: what the streams add up to."""
    shuffle_block: Positive = 262_144
    """Shards are shuffled whole, then so many samples together. The cache should hold two such
    blocks (8 GB each at 30 kB a sample)."""
    heldout: list[StreamRecipe] = field(default_factory=list)
    """Held-out pairs for retrieval and captions; the first set is the one that is watched."""
    make_with: str = ""
    """The command that makes the data, named when it is missing."""
    min_crop_scale: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Lower end of the area of RandomResizedCrop (published: 0.2 for pretraining, 0.5 for
    fine-tuning)."""
    flip: bool = True
    """Horizontal flip with probability one half."""
    augment: bool = True
    """RandAugment with N=2, M=5 over the published ten operations."""
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """Largest image, width times height, judged by its header. A larger one is a corrupt sample."""
    transform: Literal["fast", "exact", "published"] = "exact"
    """How training images are made: `exact` gives the published pixels (63 to 74 dB) at twice the
    speed, `fast` decodes a JPEG at 1/2, 1/4 or 1/8 where the crop is large enough (35 to 44 dB
    there), `published` is Pillow's way. All draw the same crops, flips and operations."""
    workers: Count = 4
    """Loader processes a rank."""
    cache_limit: str | None = None
    """Largest size of the local cache, e.g. `200gb`; null keeps everything."""
    retry_s: Rate = 900.0
    """So long a remote that fails is asked again before the run gives up; below the
    `train.stall_timeout_s` that ranks wait for each other."""


@dataclass(frozen=True, config=_STRICT)
class OptimizerRecipe:
    schedule: Literal["pretrain", "cosine"] = "pretrain"
    """`pretrain`: warm-up in the first epoch, then lr_decay once an epoch; `cosine`: half a cosine
    from peak_lr in the first epoch towards min_lr after the last, once an epoch (fine-tuning)."""
    peak_lr: Above0 = 3e-4
    """Learning rate after the warm-up."""
    min_lr: Rate = 1e-6
    """The decay never goes below it."""
    warmup_lr: Rate = 1e-6
    """Learning rate of the first step."""
    warmup_steps: Count = 3000
    """Linear warm-up from warmup_lr to peak_lr, within the first epoch (as published)."""
    warmup_spans_epochs: bool = False
    """Let a warm-up that is longer than the first epoch go on in the next ones. Published: false,
    the second epoch begins at its full rate."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """peak_lr * lr_decay ** epoch after the first epoch, never below min_lr (the code's 0.9; the
    paper says 0.85)."""
    weight_decay: Rate = 0.05
    """On every parameter, as published."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the running means of AdamW."""
    eps: Above0 = 1e-8
    """Added to the denominator of AdamW."""
    gradient_clip: Rate = 0.0
    """Largest norm of the gradient over all ranks; 0 is off (published: off)."""


@dataclass(frozen=True, config=_STRICT)
class TrainRecipe:
    global_batch_size: Positive = 2880
    """Pairs an optimizer step, over all ranks and accumulation micro-steps."""
    micro_batch_size: Positive | None = None
    """Pairs a rank takes through the network at once; null: global_batch_size / ranks (no
    accumulation), or what max_micro_batch_size makes of it."""
    max_micro_batch_size: Positive | Literal["auto"] | None = None
    """Where micro_batch_size is null: the largest size up to this one that divides
    global_batch_size / ranks is taken, and accumulation does the rest. So a recipe runs on more or
    fewer ranks with the same global batch. `auto`: the largest that fits the memory of the device,
    settled once when a run starts (pretraining and retrieval). The size of a micro-batch is the
    number of pairs that local ITM negatives and ITC's own pairs come from."""
    pad_tokens_to: Positive | Literal["auto"] = "auto"
    """Pretraining and retrieval: fill the packed captions of a micro-batch up to a multiple of so
    many tokens, so that tensors have few static sizes; losses and gradients stay the same. auto: on
    a GPU the power of two that costs at most 3 % more (90 pairs: 128), elsewhere 1, no filling
    up."""
    epochs: Positive = 20
    """Times through the training streams."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the weights and activations; masters, momentum, queues and losses are always fp32."""
    whole_weights: Literal["auto"] | bool = "auto"
    """Under ZeRO-3: whether every rank keeps all weights between the passes. It saves hundreds of
    exchanges a step; masters and moments stay partitioned. auto: where the states need at most half
    of the memory, unless the DeepSpeed JSON offloads, quantizes or sets
    stage3_param_persistence_threshold."""
    max_nonfinite_steps: Positive = 10
    """Stop with a report after this many skipped steps in a row (loss or gradient not finite)."""
    stall_timeout_s: Rate = 1800.0
    """A rank that takes longer for a step, an evaluation, a save or the start ends, with its stacks
    in its log, and the run with it; ranks wait as long for each other. 0: for ever."""

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: Any) -> Any:
        if value == "fp16":
            raise ValueError(f"{FP16_REFUSED}; expected one of fp32, bf16")
        return value


@dataclass(frozen=True, config=_STRICT)
class CheckpointRecipe:
    every_steps: Positive = 1000
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep_last: Positive = 3
    """Whole checkpoints that are kept; older ones are deleted."""
    keep_every: Positive | None = None
    """Checkpoints of steps that are multiples of this are kept for ever; null: none is."""
    folder: str | None = None
    """Where they go; null: output_dir/checkpoints. A path may differ from node to node (a local
    disk). s3://bucket/prefix: they are committed in output_dir/checkpoints and uploaded from there,
    and fetched where output_dir lacks them. Environment variables are expanded."""
    background: bool = True
    """Write while training goes on: the pause is that of a copy in host memory."""
    retry_s: Rate = 300.0
    """So long object storage that fails is asked again: at the start, by an upload (which is then
    tried again after the next save), and so long at most a run that ends waits for uploads."""


@dataclass(frozen=True, config=_STRICT)
class LogRecipe:
    to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Loggers: tensorboard, wandb (Weights & Biases; `pip install wandb`), csv (metrics.csv).
    metrics.jsonl is always written."""
    every_steps: Positive = 50
    """Optimizer steps between two logged points, each with a line on the terminal."""
    every_s: Above0 | None = 30.0
    """Longest time without a line on the terminal, in seconds. Lines between two points hold the
    means since the last point. null: no such lines."""
    peak_tflops: Above0 | None = None
    """Matrix-multiply peak of one rank's device, for MFU; null: measured at the start."""
    sample_ids: bool = False
    """Keep the ids of every step's samples, rank by rank, in samples/rank_N.jsonl."""


@dataclass(frozen=True, config=_STRICT)
class EvaluationRecipe:
    every_steps: Positive | Literal["epoch"] = 5000
    """Held-out figures every so many steps, or after each epoch, and at the end."""
    max_pairs: Positive = 5000
    """Images taken from each held-out set, with all their captions."""
    batch_size: Positive = 64
    """Images or texts a rank takes through the network at once."""
    rerank_top_k: Count = 128
    """ITM re-ranks this many candidates by contrastive similarity; VQA scores whole so many answers
    of the list by their first word piece."""
    captions: Count = 8
    """Held-out images that are captioned for the panel."""
    num_beams: Positive = 3
    """Width of the beam search."""
    max_caption_tokens: Positive = 20
    """Longest caption, prompt included."""
    min_caption_tokens: Count = 5
    """Shortest caption, prompt included."""
    answer_list: str | None = None
    """VQA: JSON list of the answers to choose from; null: beam search writes the answer."""
    repetition_penalty: Annotated[float, Field(ge=1)] = 1.0
    """Above 1 makes words that are there already less likely (published: 1, for NoCaps 1.1)."""
    scoring: Literal["published", "huggingface"] = "published"
    """Length that beam search divides a caption's score by: `published` counts the prompt and not
    [SEP], as the transformers that BLIP pins; `huggingface` counts as today's."""


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    task: Literal["pretrain", "retrieval", "captioning", "vqa", "nlvr2", "visdial"] = "pretrain"
    """What is trained: a name of blip_scale.tasks.TASKS."""
    output_dir: str = "runs/default"
    """Checkpoints, logs, TensorBoard and summary.json."""
    seed: Count = 42
    """With it, a step is a pure function of the recipe and of the samples seen."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)


def load(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from the package, by name, or from a YAML file, with overrides on top.

    Args:
        name_or_file: `demo`, `base_14M`, ... or the path of a YAML file.
        overrides: `train.epochs=2`, `--train.epochs=2` or `--train.epochs`, `2`; values are YAML,
            list items go by index (`data.streams.0.local=...`).

    Raises:
        FileNotFoundError: no such recipe or file.
        ValueError: an unknown setting or a value that is not allowed; names file or override,
            setting and mend.
    """
    file = _find(name_or_file)
    tree = settings.read_yaml(file)
    return settings.build(Recipe, tree, str(file), settings.parse_overrides(overrides))


def stated(name_or_file: str, overrides: Sequence[str] = ()) -> set[str]:
    """The dotted names of the settings that a file and overrides say; takes and raises what `load`
    does. A mapping of names, as model.vision.overrides, is one setting."""
    tree = settings.read_yaml(_find(name_or_file))
    names = {override.name for override in settings.parse_overrides(overrides)}
    return names | set(_leaves(tree))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")


def to_yaml(recipe: Recipe) -> str:
    """Every setting of the recipe as YAML; `load` of it gives the same recipe."""
    return settings.dump_yaml(recipe)


def names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse arguments of a command that has an option --recipe, where they are no overrides.

    Raises:
        ValueError: an argument has none of the forms of an override; a recipe among them is told
            apart.
    """
    try:
        settings.parse_overrides(arguments)
    except settings.BareArgument as error:
        name = error.argument
        if name in names() or name.endswith((".yaml", ".yml")) or Path(name).is_file():
            raise ValueError(f"{name}: not a setting; for a recipe use --recipe {name}") from error
        raise


def _find(name_or_file: str) -> Path:
    if name_or_file in names():
        return RECIPES / f"{name_or_file}.yaml"
    file = Path(name_or_file)
    if file.suffix in (".yaml", ".yml") or file.is_file():
        return file
    close = difflib.get_close_matches(name_or_file, names(), n=1)
    hint = f"the nearest is {close[0]}; " if close else ""
    raise FileNotFoundError(
        f"--recipe {name_or_file}: no such recipe; {hint}there are {', '.join(names())}; "
        "or give a YAML file"
    )
