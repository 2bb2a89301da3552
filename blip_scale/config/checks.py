"""Refuse recipes that cannot work, before any slow import and before any data is loaded."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

from blip_scale.config import loss_reference, weight_placement
from blip_scale.config.batch_sizes import BatchSizes, batch_sizes, is_auto
from blip_scale.config.deepspeed_keys import AUTO, check_keys
from blip_scale.config.recipe import FP16_REFUSED, DataRecipe, OptimizerRecipe, Recipe, StreamRecipe
from blip_scale.config.settings import expand


def check(recipe: Recipe, world_size: int) -> BatchSizes:
    """Check that a recipe can run on `world_size` ranks, and return its batch sizes.

    Raises:
        ValueError: settings contradict each other, or an environment variable is not set.
        FileNotFoundError: data or initial weights are missing. The message says how to get them.
    """
    sizes = batch_sizes(recipe, world_size)
    _check_pools(recipe, sizes)
    _check_model(recipe)
    _check_bounds(recipe)
    _check_checkpoints(recipe)
    if recipe.log.reference is not None:
        loss_reference.load(recipe.log.reference)
    _check_data(recipe)
    return sizes


def shipped_deepspeed(name: str) -> Path:
    """Return the path of a shipped DeepSpeed JSON.

    It is in ds_configs/ of a clone, else in the installed package.
    """
    package = Path(__file__).resolve().parent.parent
    beside = package.parent / "ds_configs" / f"{name}.json"
    return beside if beside.is_file() else package / "ds_configs" / f"{name}.json"


def resolve_deepspeed(
    recipe: Recipe, ds_config_path: str | Path, world_size: int
) -> dict[str, Any]:
    """Read DeepSpeed's settings and fill in every "auto" from the recipe.

    The recipe sets batch sizes, clipping, precision, optimizer and schedule. For these settings,
    the JSON must have "auto", the same value, or no entry. The result has neither `optimizer` nor
    `scheduler`, because the engine builds both.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, has a setting that is not supported (a ZeRO stage other
            than 2 or 3, fp16), or contradicts the recipe.
    """
    path = Path(ds_config_path)
    config = _read_json(path)
    check_keys(config, path)
    stage = _object(config, "zero_optimization", path).get("stage", 0)
    if stage not in (2, 3):
        raise ValueError(
            f"{path}: zero_optimization.stage: expected 2 or 3, found {json.dumps(stage)}"
        )
    obstacle = weight_placement.obstacle(config["zero_optimization"]) if stage == 3 else None
    if recipe.train.whole_weights is True and obstacle:
        raise ValueError(
            f"train.whole_weights: true, but {path} sets {obstacle}, which needs partitioned "
            f"weights; remove {obstacle}, or set train.whole_weights to auto"
        )
    if recipe.model.compile is True and stage == 3 and recipe.train.whole_weights is False:
        raise ValueError(
            "model.compile: torch.compile can't trace the blocks of partitioned weights, which "
            "Python code gathers; set train.whole_weights to auto, or model.compile to false"
        )
    if _object(config, "fp16", path).get("enabled") not in (None, False, AUTO):
        raise ValueError(f"{path}: fp16.enabled: {FP16_REFUSED}; set it to false")
    for name in ("amp", "torch_autocast"):
        if _object(config, name, path).get("enabled") not in (None, False, AUTO):
            raise ValueError(
                f"{path} and the recipe disagree: {name} is enabled, but train.precision "
                f"{recipe.train.precision} sets the precision; remove {name}"
            )
    sizes = batch_sizes(recipe, world_size)
    is_bf16 = recipe.train.precision == "bf16"
    filled = {
        "train_batch_size": (sizes.global_batch, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (sizes.micro_batch, "train.micro_batch_size"),
        "gradient_accumulation_steps": (sizes.accumulation, "global / (micro_batch_size * ranks)"),
        "gradient_clipping": (recipe.optimizer.gradient_clip, "optimizer.gradient_clip"),
    }
    for name, (value, setting) in filled.items():
        _agree(path, name, config.get(name), setting, value)
        config[name] = value
    bf16 = _object(config, "bf16", path)
    precision = f"train.precision {recipe.train.precision}"
    _agree(path, "bf16.enabled", bf16.get("enabled"), precision, is_bf16)
    config["bf16"] = bf16 | {"enabled": is_bf16}
    _check_optimizer(path, config, recipe.optimizer)
    if config.get("scheduler", AUTO) != AUTO:
        raise ValueError(
            f"{path} and the recipe disagree: scheduler is set, but the learning rate follows the "
            "recipe's optimizer.schedule; remove scheduler"
        )
    for name in ("optimizer", "scheduler", "fp16", "amp", "torch_autocast"):
        config.pop(name, None)
    config["zero_allow_untested_optimizer"] = True  # the engine's AdamW can skip steps
    return _without_auto(config)


def _agree(path: Path, name: str, value: Any, setting: str, wanted: Any) -> None:
    """Raise ValueError unless a value in the JSON is "auto", missing or equal to the recipe's."""
    if value in (None, AUTO, wanted):
        return
    raise ValueError(
        f"{path} and the recipe disagree: {name} is {json.dumps(value)}, but {setting} gives "
        f'{json.dumps(wanted)}; set {name} to "auto", or change the recipe'
    )


def _check_optimizer(path: Path, config: dict[str, Any], optimizer: OptimizerRecipe) -> None:
    """Refuse an optimizer in the JSON unless it is AdamW with the recipe's parameters."""
    if config.get("optimizer", AUTO) == AUTO:
        return
    section = _object(config, "optimizer", path)
    if str(section.get("type", "")).lower() != "adamw":
        _agree(path, "optimizer.type", section.get("type", "missing"), "the recipe", "AdamW")
    wanted = {
        "lr": ("optimizer.peak_lr", optimizer.peak_lr),
        "betas": ("optimizer.betas", list(optimizer.betas)),
        "eps": ("optimizer.eps", optimizer.eps),
        "weight_decay": ("optimizer.weight_decay", optimizer.weight_decay),
    }
    for name, value in _object(section, "params", path).items():
        if name in wanted:
            _agree(path, f"optimizer.params.{name}", value, *wanted[name])
        elif name not in ("torch_adam", "adam_w_mode", "fused", "foreach"):
            raise ValueError(
                f"{path}: optimizer.params.{name}: not supported; remove it "
                f"({', '.join(wanted)} are supported)"
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"--deepspeed {path}: no such file; "
            "ds_configs/ has zero3.json, zero2.json and zero3_offload.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a duplicate key, nested too deep
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object with DeepSpeed's settings")
    return config


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, and refuse duplicate keys. Python's json would silently use the last."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]} is set twice; remove one")
    return dict(pairs)


def _object(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the JSON object under `name`, or an empty one if it is missing."""
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name}: expected an object, found {json.dumps(value)}")
    return value


def _without_auto(value: Any) -> Any:
    """Copy a tree without its "auto" values. DeepSpeed then uses its defaults for them."""
    if isinstance(value, dict):
        return {name: _without_auto(inner) for name, inner in value.items() if inner != AUTO}
    return value


def _check_pools(recipe: Recipe, sizes: BatchSizes) -> None:
    """Check that hard negatives have at least two pairs, and that a queue can hold a batch."""
    if recipe.task not in ("pretrain", "retrieval"):
        if is_auto(recipe):
            raise ValueError(
                f"train.max_micro_batch_size: auto supports pretrain and retrieval, but not "
                f"{recipe.task}, whose memory is not modelled; give a number"
            )
        return
    pool = sizes.micro_batch * (sizes.world_size if recipe.objective.itm == "global" else 1)
    if pool < 2 and recipe.objective.itm != "none":
        fix = "train.micro_batch_size=2 or more"
        if recipe.objective.itm == "local" and sizes.world_size > 1:
            fix += ", or objective.itm=global"
        raise ValueError(
            f"train.micro_batch_size: ITM draws its negatives from a pool of {pool} pair, which "
            f"has no other pair to draw; set {fix}"
        )
    if recipe.objective.itc == "momentum" and sizes.global_batch > recipe.objective.queue_size:
        raise ValueError(
            f"train.global_batch_size: {sizes.global_batch} is larger than objective.queue_size "
            f"{recipe.objective.queue_size}; set objective.queue_size={sizes.global_batch} or more"
        )


def _check_model(recipe: Recipe) -> None:
    """Check that the network's sizes fit together, and that its initial weights exist."""
    vision, text = recipe.model.vision, recipe.model.text
    patch, heads = vision.overrides.get("patch_size"), vision.overrides.get("num_heads")
    if patch and vision.image_size % patch:
        raise ValueError(
            f"model.vision.image_size: {vision.image_size} is not a multiple of "
            f"the patch size {patch}"
        )
    if heads and vision.overrides.get("embed_dim", heads) % heads:
        raise ValueError(
            f"model.vision.overrides: embed_dim {vision.overrides['embed_dim']} "
            f"is not a multiple of num_heads {heads}"
        )
    if text.checkpoint is None and text.tokenizer is None:
        raise ValueError(
            "model.text: without a checkpoint there is no vocabulary; "
            "give model.text.checkpoint or model.text.tokenizer"
        )
    if text.checkpoint is None and text.width % text.heads:
        raise ValueError(
            f"model.text.width: {text.width} is not a multiple of model.text.heads {text.heads}"
        )
    for name, value in (("checkpoint", text.checkpoint), ("tokenizer", text.tokenizer)):
        if value is not None:
            _check_package(f"model.text.{name}", expand(value, f"model.text.{name}"))
    _check_frozen(recipe)
    if recipe.model.checkpoint is not None:
        whole = Path(expand(recipe.model.checkpoint, "model.checkpoint"))
        if not whole.exists():
            raise FileNotFoundError(
                f"model.checkpoint: {whole}: no such file or folder; give a training checkpoint, "
                "a BLIP .pth, a Hugging Face folder, or null"
            )
    elif vision.checkpoint not in (None, "timm"):
        file = Path(expand(vision.checkpoint, "model.vision.checkpoint"))
        if not file.is_file():
            raise FileNotFoundError(
                f"model.vision.checkpoint: {file}: no such file; "
                "give a .safetensors or .pth file, timm or null"
            )


def _check_frozen(recipe: Recipe) -> None:
    """Check that frozen parts have pretrained weights, and that no adapter is on a frozen part."""
    model = recipe.model
    lora = model.lora
    targets: set[str] = set(lora.targets) if lora.rank else set()
    if lora.rank and not targets:
        raise ValueError("model.lora.targets: [] gives no adapters; name a part, or set rank to 0")
    for part, frozen in (("vision", model.vision.frozen), ("text", model.text.frozen)):
        if frozen and part in targets:
            raise ValueError(
                f"model.lora.targets: {part} gets adapters, but model.{part}.frozen keeps it as it "
                f"is; remove {part} from the targets, or set model.{part}.frozen to false"
            )
    objective = recipe.objective
    is_contrastive = recipe.task in ("pretrain", "retrieval")
    decodes = recipe.task == "pretrain" and objective.lm != "none"
    if "cross_attention" in targets and is_contrastive and objective.itm == "none" and not decodes:
        raise ValueError(
            "model.lora.targets: no loss reads cross_attention; remove it, or train ITM or LM"
        )
    random = {
        "vision": model.vision.checkpoint is None,
        "text": model.text.checkpoint is None,
        "cross_attention": True,
    }
    fixed = set(random) if lora.rank and lora.also_train != "rest" else targets
    fixed = fixed | {part for part in ("vision", "text") if getattr(model, part).frozen}
    unset = sorted(part for part in fixed if random[part])
    if model.checkpoint is None and unset:
        raise ValueError(
            f"model.checkpoint: null, so the frozen weights of {', '.join(unset)} would be random; "
            "give a checkpoint"
        )


def _check_package(setting: str, value: str) -> None:
    """Refuse a `package:NAME` whose package is not installed."""
    scheme, _, name = value.partition(":")
    package = name.replace("/", ".").split(".")[0]
    if scheme == "package" and (not package or importlib.util.find_spec(package) is None):
        raise FileNotFoundError(
            f"{setting}: {value}: the Python package {package or '(no name)'} is not installed; "
            f"pip install {package.replace('_', '-')}"
        )


def _check_bounds(recipe: Recipe) -> None:
    """Check pairs of settings of which one must not exceed the other."""
    optimizer, evaluation = recipe.optimizer, recipe.evaluation
    pairs = (
        ("optimizer.min_lr", optimizer.min_lr, "optimizer.peak_lr", optimizer.peak_lr),
        ("optimizer.warmup_lr", optimizer.warmup_lr, "optimizer.peak_lr", optimizer.peak_lr),
        ("evaluation.min_caption_tokens", evaluation.min_caption_tokens,
         "evaluation.max_caption_tokens", evaluation.max_caption_tokens),
    )  # fmt: skip
    for low, low_value, high, high_value in pairs:
        if low_value > high_value:
            raise ValueError(f"{low}: {low_value} is larger than {high} {high_value}")


def _check_checkpoints(recipe: Recipe) -> None:
    """Check that checkpoints go to a path or to S3."""
    if recipe.checkpoint.folder is None:
        return
    location = expand(recipe.checkpoint.folder, "checkpoint.folder")
    scheme, separator, path = location.partition("://")
    if separator and (scheme != "s3" or not path.strip("/")):
        raise ValueError(
            f"checkpoint.folder: {location}: expected a path, s3://bucket/prefix or null"
        )


def _check_data(recipe: Recipe) -> None:
    """Check that there are streams, that their names are unique, and that their data exist."""
    data = recipe.data
    if not data.streams:
        raise ValueError(
            "data.streams: no training data; list at least one stream with name and local"
        )
    for group, streams in (("streams", data.streams), ("heldout", data.heldout)):
        seen: set[str] = set()
        for index, stream in enumerate(streams):
            setting = f"data.{group}.{index}"
            if stream.name in seen:
                raise ValueError(
                    f"{setting}.name: {stream.name} is the name of an earlier stream; rename one"
                )
            seen.add(stream.name)
            _check_captions(setting, stream)
            _check_stream(setting, stream, data.make_with)
    _check_caches(data)
    _check_mixture(data)
    _check_image_sizes(recipe)


def _check_image_sizes(recipe: Recipe) -> None:
    """Check that early image sizes are in the order of their epochs, and the task is pretrain."""
    stages = recipe.data.image_sizes
    if stages and recipe.task != "pretrain":
        raise ValueError(f"data.image_sizes: only pretrain has them, not {recipe.task}; remove it")
    for index, (before, after) in enumerate(itertools.pairwise(stages), start=1):
        if after.until_epoch <= before.until_epoch:
            raise ValueError(
                f"data.image_sizes.{index}.until_epoch: {after.until_epoch:g} is not later than "
                f"the {before.until_epoch:g} before it; put the stages in order"
            )


def _check_captions(setting: str, stream: StreamRecipe) -> None:
    """Refuse caption shares that are all 0, and captions or overlays that contradict settings."""
    if stream.captions and not any(stream.captions.values()):
        raise ValueError(f"{setting}.captions: all shares are 0; give one role a share above 0")
    if stream.captions and stream.repeat == "captions":
        raise ValueError(
            f"{setting} ({stream.name}): captions draws one caption by its role, but repeat: "
            "captions reads each caption once; keep one of them"
        )
    if stream.overlays and stream.repeat == "captions":
        raise ValueError(
            f"{setting} ({stream.name}): repeat: captions counts the captions of the shards, not "
            "those of overlays; give repeat a number"
        )
    if stream.overlays and stream.format == "tars":
        raise ValueError(
            f"{setting} ({stream.name}): overlays fit shards, not tars; convert the tars with "
            "`blip-scale prepare-data`, or remove overlays"
        )
    for number, overlay in enumerate(stream.overlays):
        place = expand(overlay, f"{setting}.overlays.{number}")
        if "://" not in place and not (Path(place) / "index.json").is_file():
            raise FileNotFoundError(
                f"{setting}.overlays.{number} ({stream.name}): no overlay in {place} (no "
                "index.json there); make it with `blip-scale overlay`"
            )


def _check_caches(data: DataRecipe) -> None:
    """Refuse streams of different remotes with the same `local`, because shards would collide."""
    remotes: dict[str, tuple[str, str | None]] = {}
    for stream in [*data.streams, *data.heldout]:
        local = expand(stream.local, f"{stream.name}.local")
        remote = expand(stream.remote, f"{stream.name}.remote") if stream.remote else None
        name, other = remotes.setdefault(local, (stream.name, remote))
        if remote != other:
            raise ValueError(
                f"data: streams {name} and {stream.name} have the same local, {local}, but "
                f"different remotes, {other} and {remote}: give one of them another local"
            )


def _check_mixture(data: DataRecipe) -> None:
    """Check that each stream sets its part of an epoch once, and that weights are complete."""
    for index, stream in enumerate(data.streams):
        sizes = {
            "repeat": stream.repeat,
            "samples_per_epoch": stream.samples_per_epoch,
            "weight": stream.weight,
        }
        chosen = [name for name, value in sizes.items() if value is not None]
        if len(chosen) > 1:
            raise ValueError(
                f"data.streams.{index} ({stream.name}): {' and '.join(chosen)} exclude each "
                "other; keep one"
            )
    without = [stream.name for stream in data.streams if stream.weight is None]
    if data.samples_per_epoch is None and len(without) < len(data.streams):
        raise ValueError(
            "data.samples_per_epoch: null, but streams have weights, which share it out; set the "
            "number of samples in an epoch"
        )
    if data.samples_per_epoch is not None and without:
        raise ValueError(
            f"data.samples_per_epoch is shared out by weights, but {', '.join(without)} has none; "
            "give every stream a weight (and neither repeat nor samples_per_epoch)"
        )


def _check_stream(setting: str, stream: StreamRecipe, make_with: str) -> None:
    """Check that a stream's folder has an index of shards. Object storage is not contacted."""
    local = expand(stream.local, f"{setting}.local")
    remote = expand(stream.remote, f"{setting}.remote") if stream.remote else None
    if remote and "://" in remote:
        return
    folder = Path(remote or local)
    if stream.format == "tars":
        if not any(folder.rglob("*.tar")):
            raise FileNotFoundError(f"{setting} ({stream.name}): no .tar in {folder}")
        return
    if not (folder / "index.json").is_file():
        fix = f"make it with: {make_with}" if make_with else f"give {setting}.local=FOLDER"
        raise FileNotFoundError(
            f"{setting} ({stream.name}): no MDS shards in {folder} (no index.json there); {fix}"
        )
