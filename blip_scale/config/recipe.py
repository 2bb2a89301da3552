"""Every setting of a run, as frozen dataclasses built from YAML and dotted overrides.

The docstring of a setting is its help text in `train.py --help`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from blip_scale.config import settings
from blip_scale.config.bounds import (
    MOST_BEAMS,
    MOST_PROCESSES,
    STRICT,
    Above0,
    BatchSize,
    Count,
    Fraction,
    Line,
    Positive,
    Rate,
    Share,
    Side,
    Width,
)
from blip_scale.config.model_recipe import ModelRecipe

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
"""Folder of the recipes shipped with the package."""

MAX_PIXELS = 89_478_485
"""Default limit of an image's size in pixels; Pillow warns above it."""

FP16_REFUSED = (
    "fp16 is not supported: losses over queue and vocabulary overflow it (users saw an LM loss "
    "of INF); bf16 has the range of fp32 and costs the same"
)


@dataclass(frozen=True, config=STRICT)
class ObjectiveRecipe:
    """Settings of the losses."""

    itc: str = "momentum"
    """Image-text contrastive (ITC) loss: a name in blip_scale.tasks.contrastive_task.CONTRASTS.
    `momentum` is BLIP's loss with momentum encoders, feature queues and soft targets; queue_size,
    momentum, alpha and alpha_ramp_epochs are its settings. `in_batch` is CLIP's softmax over the
    micro-batches of all ranks. `sigmoid` is SigLIP's loss over all pairs of these; start it with a
    temperature of 0.1."""
    itm: Literal["local", "global", "none"] = "local"
    """Image-text matching (ITM) with hard negatives from the rank's own micro-batch (local, as
    published) or from those of all ranks (global). none: no matching loss."""
    lm: Literal["next_token", "none"] = "next_token"
    """Pretraining: language modelling (LM) of the captions. none: no such loss, and no decoder."""
    itc_weight: Above0 = 1.0
    """Factor of the ITC loss in the total (published: 1)."""
    itm_weight: Above0 = 1.0
    """Factor of the ITM loss in the total (published: 1)."""
    lm_weight: Above0 = 1.0
    """Pretraining: factor of the LM loss in the total (published: 1)."""
    sigmoid_bias: float = -10.0
    """Initial value of the learned bias that `itc: sigmoid` adds to all similarities (SigLIP:
    -10)."""
    queue_size: BatchSize = 57600
    """Number of momentum features kept per modality. Must be at least the global batch size."""
    momentum: Share = 0.995
    """Decay of the momentum encoders: p_m <- momentum * p_m + (1 - momentum) * p, once per
    optimizer step."""
    alpha: Share = 0.4
    """Weight of the momentum soft targets in ITC after the ramp."""
    alpha_ramp_epochs: Rate = 2.0
    """Epochs over which alpha rises linearly from 0."""
    temperature: Annotated[float, Field(ge=0.001, le=0.5)] = 0.07
    """Initial contrastive temperature. It is learned, and clamped to [0.001, 0.5]."""
    label_smoothing: Fraction = 0.1
    """Label smoothing of the language modelling (LM) loss."""
    false_answers: Positive = 2
    """VisDial: number of false candidate answers per true one in training. The default 2 is
    the number of negatives per pair in ITM."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_name(cls, values: Any) -> Any:
        """Accept `negatives`, the former name of `itm`, in the recipe files of older runs."""
        if isinstance(values, dict) and "negatives" in values and "itm" not in values:
            values = {**values, "itm": values["negatives"]}
            del values["negatives"]
        return values


@dataclass(frozen=True, config=STRICT)
class StreamRecipe:
    """Settings of a training or held-out set."""

    name: Line
    """Name of the stream in logs and statistics; must be unique."""
    local: Line
    """Folder of the MDS shards, or the local cache if `remote` is set. Environment variables are
    expanded."""
    remote: Line | None = None
    """Source of the shards: another folder, or a URL with s3://, gs://, az:// or https://. null:
    the shards are in `local`."""
    format: Literal["mds", "tars"] = "mds"
    """Format of the files. `tars`: uncompressed webdataset tars, which are read in place by their
    index (see docs/data.md)."""
    repeat: Above0 | Literal["captions"] | None = None
    """Number of times that an epoch reads the stream; 0.5 reads a different half in each epoch. An
    image with several captions is used with a different caption each time. `captions` reads each
    image once per caption. Set at most one of repeat, samples_per_epoch and weight. With none, an
    epoch reads the stream once."""
    samples_per_epoch: Positive | None = None
    """Number of samples that an epoch takes from the stream. The next epoch continues where this
    one stopped."""
    weight: Above0 | None = None
    """Share of this stream in `data.samples_per_epoch`, relative to the weights of the other
    streams. If one stream has a weight, all must have one."""
    captions: dict[str, Rate] = field(default_factory=dict)
    """Share of each caption role, e.g. {re_caption: 0.75, alt: 0.25}. If a sample lacks a role, its
    other roles get that share. Captions without a role have the role `caption`. Held-out sets keep
    only the captions of these roles. {}: the captions of all roles are used in turn."""
    overlays: list[Line] = field(default_factory=list)
    """Additional captions for the same images: folders or URLs made for these shards by `blip-scale
    overlay` or `capfilt --as overlay`. Their roles are added to those of the shards."""


@dataclass(frozen=True, config=STRICT)
class ImageSizeRecipe:
    """A size of the training images in early epochs."""

    size: Side
    """Side of the training images in pixels, a multiple of the patch size."""
    until_epoch: Above0
    """Epoch at whose start the next size begins; 1.5 is the middle of the second epoch."""


@dataclass(frozen=True, config=STRICT)
class DataRecipe:
    """Settings of the data and their loading."""

    streams: list[StreamRecipe] = field(default_factory=list)
    """Training streams. An epoch shuffles the samples of all streams together."""
    samples_per_epoch: Positive | None = None
    """Number of samples in an epoch, divided among the streams by their weights. null: the sum of
    the streams' samples."""
    shuffle_block: Positive = 262_144
    """Number of samples that are shuffled together, after the shards are shuffled. The cache should
    hold two blocks (8 GB each at 30 kB per sample)."""
    heldout: list[StreamRecipe] = field(default_factory=list)
    """Held-out pairs for retrieval and captions. Monitoring follows the first set."""
    make_with: str = ""
    """Command that creates the data, named in the error if the data is missing."""
    image_sizes: list[ImageSizeRecipe] = field(default_factory=list)
    """Pretraining: smaller sizes of the training images in early epochs, to make steps cheaper.
    Later training images, and those of evaluations, have model.vision.image_size. The forward pass
    interpolates the position embeddings. Changes the mathematics; not in the paper."""
    min_crop_scale: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Smallest share of the image's area in RandomResizedCrop (published: 0.2 for pretraining, 0.5
    for fine-tuning)."""
    flip: bool = True
    """Flip training images horizontally with probability 0.5."""
    augment: bool = True
    """Apply RandAugment with N=2 and M=5 over the published ten operations."""
    max_pixels: Positive = MAX_PIXELS
    """Largest allowed image in pixels (width times height), read from its header. A larger image
    counts as a corrupt sample."""
    transform: Literal["fast", "exact", "published"] = "exact"
    """Implementation of the image transforms. `published` uses Pillow, as BLIP does. `exact` gives
    nearly the same pixels (PSNR 63 to 74 dB) at twice the speed. `fast` also decodes JPEGs at 1/2,
    1/4 or 1/8 size where the crop is large enough (PSNR 35 to 44 dB). All draw the same crops,
    flips and operations."""
    workers: Annotated[int, Field(ge=0, le=MOST_PROCESSES)] = 4
    """Number of loader processes per rank."""
    cache_limit: str | None = None
    """Largest size of the local cache, e.g. `200gb`. null: no limit."""
    retry_s: Rate = 900.0
    """Retry a failing remote for this many seconds, then stop. With a remote stream, this time is
    added to the hang limits of the start, of an evaluation and of a wait for data."""


@dataclass(frozen=True, config=STRICT)
class OptimizerRecipe:
    """Settings of AdamW and the learning rate."""

    schedule: Literal["pretrain", "cosine"] = "pretrain"
    """Learning rate schedule. `pretrain`: linear warm-up in the first epoch, then a decay by
    lr_decay each epoch. `cosine` (fine-tuning): half a cosine from peak_lr to min_lr, updated once
    per epoch."""
    peak_lr: Above0 = 3e-4
    """Learning rate after the warm-up."""
    min_lr: Rate = 1e-6
    """Lower limit of the decaying learning rate."""
    warmup_lr: Rate = 1e-6
    """Learning rate of the first step."""
    warmup_steps: Count = 3000
    """Number of steps of the linear warm-up from warmup_lr to peak_lr. The warm-up ends with the
    first epoch (published), unless warmup_spans_epochs is set."""
    warmup_spans_epochs: bool = False
    """Continue the warm-up in the next epochs if it is longer than the first one. false
    (published): the second epoch starts at its full learning rate."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Decay factor of the learning rate: peak_lr * lr_decay ** epoch after the first epoch, at
    least min_lr (0.9 in BLIP's code, 0.85 in the paper)."""
    weight_decay: Rate = 0.05
    """Weight decay of AdamW, applied to every parameter as published."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of AdamW's running averages of the gradient and its square."""
    eps: Above0 = 1e-8
    """Term added to AdamW's denominator for numerical stability."""
    gradient_clip: Rate = 0.0
    """Largest norm of the gradient over all ranks; larger gradients are scaled down. 0: no clipping
    (published)."""


@dataclass(frozen=True, config=STRICT)
class TrainRecipe:
    """Settings of batches, precision and the run's length."""

    global_batch_size: BatchSize = 2880
    """Number of pairs per optimizer step, over all ranks and accumulation micro-steps."""
    micro_batch_size: BatchSize | None = None
    """Number of pairs that a rank takes through the network at once. Local ITM negatives come from
    these pairs. null: global_batch_size / ranks (no accumulation), limited by
    max_micro_batch_size."""
    max_micro_batch_size: BatchSize | Literal["auto"] | None = None
    """Upper limit of the micro-batch if micro_batch_size is null. The largest size up to this one
    that divides global_batch_size / ranks is used, with gradient accumulation for the rest. A
    recipe thus keeps its global batch on any number of ranks. auto (pretraining and retrieval): the
    largest size that fits into the device's memory, chosen once when the run starts."""
    pad_tokens_to: Width | Literal["auto"] = "auto"
    """Pretraining and retrieval: pad the packed captions of a micro-batch to a multiple of this
    many tokens, so that tensors have few static sizes. Losses and gradients do not change. auto: on
    a GPU, the largest power of two that costs at most 3 % time (128 for 90 pairs); else 1."""
    epochs: BatchSize = 20
    """Number of epochs. The settings of each stream determine its samples in an epoch."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, even before train.epochs is reached. null: no limit."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Data type of weights and activations. Master weights, momentum averages, queues and losses
    are always fp32."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """Inner precision of fp32 matrix products, as in torch.set_float32_matmul_precision. highest:
    fp32. high: TF32 on GPUs that have it. Stored values stay fp32. No effect on bf16."""
    whole_weights: Literal["auto"] | bool = "auto"
    """ZeRO-3: keep all weights gathered on every rank between the passes. This saves hundreds of
    collectives per step; master weights and moments stay partitioned. auto: true if the states need
    at most half of the memory, unless the DeepSpeed JSON offloads, quantizes or sets
    stage3_param_persistence_threshold."""
    max_nonfinite_steps: Positive = 10
    """Stop with a report after this many consecutive steps were skipped because the loss or the
    gradient was not finite."""

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: Any) -> Any:
        if value == "fp16":
            raise ValueError(f"{FP16_REFUSED}; expected one of fp32, bf16")
        return value

    @model_validator(mode="before")
    @classmethod
    def _skip_old_limit(cls, values: Any) -> Any:
        """Ignore `stall_timeout_s` in the recipe files of older runs. `hang_limits` replaced it."""
        if isinstance(values, dict) and "stall_timeout_s" in values:
            logger.warning("train.stall_timeout_s is no longer read: hang_limits replaced it")
            values = {name: value for name, value in values.items() if name != "stall_timeout_s"}
        return values


@dataclass(frozen=True, config=STRICT)
class HangLimitsRecipe:
    """Longest durations in seconds. If a rank exceeds a limit, the run ends, with stack traces in
    the rank's log. 0: no limit."""

    start_s: Rate = 900.0
    """Limit of a start, which includes rendezvous, opening the data, loading a checkpoint,
    compilation, and the first three steps."""
    step_s: Literal["auto"] | Rate = "auto"
    """Limit of a step. auto: the larger of 180 s and 20 times the median of the last hundred steps
    since the start, but at most the largest other limit."""
    evaluation_s: Rate = 1800.0
    """Longest time in an evaluation without a new batch, including waits for other ranks. The limit
    of a batch is the larger of 180 s and 20 times the median of its loop, but at most this."""
    save_s: Rate = 900.0
    """Limit of the pause for a checkpoint. If checkpoints go to a bucket, `checkpoint.retry_s` is
    added."""


@dataclass(frozen=True, config=STRICT)
class CheckpointRecipe:
    """Settings of checkpoints."""

    every_steps: Positive = 1000
    """Number of optimizer steps between two checkpoints. The last step is always saved."""
    keep_last: Positive = 3
    """Number of complete checkpoints to keep; older ones are deleted."""
    keep_every: Positive | None = None
    """Never delete the checkpoints of steps that are multiples of this number. null: only keep_last
    applies."""
    folder: Line | None = None
    """Folder of the checkpoints; null: output_dir/checkpoints. A path may be on a local disk of
    each node. With s3://bucket/prefix, checkpoints are committed in output_dir/checkpoints, then
    uploaded. If output_dir lacks them, they are downloaded. Environment variables are expanded."""
    background: bool = True
    """Write checkpoints while training continues. Training only pauses for a copy to host
    memory."""
    retry_s: Rate = 300.0
    """Retry failing object storage for this many seconds, at the start and for each upload. A
    failed upload is tried again after the next save. A run that ends waits at most this long for
    its uploads."""


@dataclass(frozen=True, config=STRICT)
class LogRecipe:
    """Settings of logging."""

    to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Loggers: tensorboard, wandb (Weights & Biases; `pip install wandb`), csv (metrics.csv).
    metrics.jsonl is always written."""
    every_steps: Positive = 50
    """Number of optimizer steps between two points in TensorBoard and metrics.jsonl. Each point is
    also a line on the terminal."""
    every_s: Above0 | None = 30.0
    """Seconds after which the terminal shows an additional line between two points, with averages
    since the last point. null: never."""
    peak_tflops: Above0 | None = None
    """Peak matrix-multiply speed of one rank's device in TFLOP/s, for MFU. null: measured at the
    start."""
    reference: Line | None = None
    """Losses of another run, plotted beside those of this run: `blip_14M` (the author's log), or a
    JSON or CSV file (docs/running.md). A comparable run that deviates from them raises an alarm."""
    sample_ids: bool = False
    """Record the sample ids of every step in samples/rank_N.jsonl."""


@dataclass(frozen=True, config=STRICT)
class EvaluationRecipe:
    """Settings of evaluations during a run."""

    every_steps: Positive | Literal["epoch"] = 5000
    """Number of optimizer steps between two evaluations on held-out data, or `epoch` for one after
    each epoch. The end of the run is always evaluated."""
    max_pairs: Positive = 5000
    """Number of images taken from each held-out set, with all their captions."""
    batch_size: BatchSize = 64
    """Number of images or texts that a rank processes at once."""
    rerank_top_k: Count = 128
    """Retrieval: number of candidates with the highest contrastive similarity that ITM re-ranks.
    VQA: number of answers from the list, preselected by their first word piece, that are scored as
    a whole."""
    captions: Count = 8
    """Number of held-out images shown with generated captions in TensorBoard."""
    num_beams: Annotated[int, Field(ge=1, le=MOST_BEAMS)] = 3
    """Number of beams in beam search."""
    max_caption_tokens: Width = 20
    """Largest number of tokens in a generated caption, prompt included."""
    min_caption_tokens: Count = 5
    """Smallest number of tokens in a generated caption, prompt included."""
    answer_list: Line | None = None
    """VQA: JSON file with the list of answers to choose from. null: beam search generates the
    answer."""
    repetition_penalty: Annotated[float, Field(ge=1)] = 1.0
    """Penalty for tokens that are already in the text. Above 1, they become less likely (published:
    1, for NoCaps 1.1)."""
    scoring: Literal["published", "huggingface"] = "published"
    """Length by which beam search divides a caption's score. `published` counts the prompt but not
    [SEP], like the transformers version that BLIP pins. `huggingface` counts like current
    transformers."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """All settings of a run."""

    task: Literal["pretrain", "retrieval", "captioning", "vqa", "nlvr2", "visdial"] = "pretrain"
    """Training task: a name in blip_scale.tasks.TASKS."""
    output_dir: Line = "runs/default"
    """Folder for checkpoints, logs, TensorBoard files and summary.json."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of all random numbers. A step is a pure function of the recipe, the seed and the samples
    seen."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    hang_limits: HangLimitsRecipe = field(default_factory=HangLimitsRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)


def load(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and apply overrides to it.

    Args:
        name_or_file: name of a shipped recipe (`demo`, `base_14M`, ...), or path of a YAML file.
        overrides: `train.epochs=2`, `--train.epochs=2`, or `--train.epochs` followed by `2`. Values
            are YAML. List items are addressed by index (`data.streams.0.local=...`).

    Raises:
        FileNotFoundError: there is no such recipe or file.
        ValueError: a setting is unknown, a value is not allowed, or the path is not a regular file.
            The message names the file or override, the setting and the fix.
    """
    file = _find(name_or_file)
    tree = settings.read_yaml(file)
    return settings.build(Recipe, tree, str(file), settings.parse_overrides(overrides))


def stated(name_or_file: str, overrides: Sequence[str] = ()) -> set[str]:
    """Return the dotted names of the settings that a file and overrides set explicitly.

    See `load` for arguments and errors. The names of sections, and of mappings such as
    model.vision.overrides, are included.
    """
    tree = settings.read_yaml(_find(name_or_file))
    names = {override.name for override in settings.parse_overrides(overrides)}
    return names | set(_leaves(tree))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")


def to_yaml(recipe: Recipe) -> str:
    """Write every setting of the recipe as YAML, from which `load` builds an equal recipe."""
    return settings.dump_yaml(recipe)


def names() -> list[str]:
    """Return the names of the recipes shipped with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not overrides, for a command with an option --recipe.

    Raises:
        ValueError: an argument is not an override. If it is a recipe, the message points to
            --recipe.
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
    if file.exists() and not file.is_file():
        kind = "a folder" if file.is_dir() else "no regular file"
        raise ValueError(
            f"--recipe {name_or_file}: is {kind}; give a YAML file, or a recipe's name"
        )
    if file.suffix in (".yaml", ".yml") or file.is_file():
        return file
    close = difflib.get_close_matches(name_or_file, names(), n=1)
    hint = f"the nearest is {close[0]}; " if close else ""
    raise FileNotFoundError(
        f"--recipe {name_or_file}: no such recipe; {hint}available are {', '.join(names())}; "
        "or give a YAML file"
    )
