"""Load a BLIP checkpoint of any kind: find its recipe and tokenizer, build and fill its network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from PIL import Image
from torch import Tensor

from blip_scale.config import recipe as recipes
from blip_scale.config.bounds import MOST_SIDE
from blip_scale.config.model_recipe import TextRecipe
from blip_scale.config.recipe import Recipe
from blip_scale.data.pixels.transforms import IMAGE_MEAN, IMAGE_STD
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.blip import Blip
from blip_scale.inference.sizes import med_config
from blip_scale.interop.blip_weights import BlipWeights, parameters_of
from blip_scale.interop.checkpoints import Format, format_of, read_checkpoint
from blip_scale.interop.heads import PREFIX
from blip_scale.interop.huggingface import pixel_settings
from blip_scale.interop.output_settings import OutputSettings
from blip_scale.interop.training_checkpoints import step_folder
from blip_scale.interop.vision import fitted_positions
from blip_scale.model.heads import build_network
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.towers import refill_constants
from blip_scale.model.visdial import VisDial
from blip_scale.model.vqa import VQA
from blip_scale.storage import checkpoint_format, run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PUBLISHED_TOKENIZER = "bert-base-uncased"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Loading:
    """Settings that a checkpoint does not hold, or that override its own."""

    recipe: str | None = None
    """Name or file of the recipe with the network's sizes. None: recipe.yaml of the run."""
    tokenizer: str | None = None
    """Folder or hub name. None: the recipe's tokenizer, else the one beside the checkpoint, else
    the published one."""
    image_size: int | None = None
    """Side in pixels; position embeddings are interpolated. None: the checkpoint's size."""
    device: str | None = None
    """Name of a torch device. None: the GPU if there is one, else the CPU."""
    precision: str | None = None
    """Either `bf16` or `fp32`. None: bf16 on a GPU and fp32 on the CPU."""


def _device(name: str | None) -> torch.device:
    """Return the device of this name. None: the GPU if there is one, else the CPU.

    Raises:
        ValueError: this machine does not have the device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        problem = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: torch can't use it here ({problem})") from error


def load_blip(source: str | Path, loading: Loading | None = None) -> Blip:
    """Load the network of a checkpoint of any kind, on its device, with its tokenizer.

    Raises:
        FileNotFoundError: the checkpoint or a part of it is missing.
        ValueError: the checkpoint is not BLIP's, is damaged or unsafe, or has a head without a use
            here; the tokenizer does not fit the network; or `loading` has impossible settings.
    """
    source, loading = Path(source), loading or Loading()
    if loading.precision not in (None, *_DTYPES):
        raise ValueError(f"precision {loading.precision}: expected one of {', '.join(_DTYPES)}")
    if loading.image_size is not None and not 1 <= loading.image_size <= MOST_SIDE:
        raise ValueError(f"image_size {loading.image_size}: expected 1 to {MOST_SIDE} pixels")
    kind = format_of(source)
    check_pixels(source, kind)
    recipe = recipe_of(source, kind, loading.recipe)
    config = None
    if recipe:
        text = text_of(recipe, loading.tokenizer)
        config = med_config(recipe, load_tokenizer(text))
    weights = read_checkpoint(source, config, with_state=False)
    tokenizer = tokenizer_of(source, weights.config, recipe, loading.tokenizer)
    device = _device(loading.device)
    precision = loading.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = _DTYPES[precision]
    fingerprint = _fingerprint(weights)
    network = _filled(_resized(weights.config, loading.image_size), weights, device, dtype)
    if recipe:
        weights.output = output_of(recipe)
    return Blip(
        network,
        tokenizer,
        weights.head,
        weights.origin,
        fingerprint,
        weights.output_settings,
        weights.output is not None,
        recipe is None or recipe.objective.itm != "none",
    )


def output_of(recipe: Recipe) -> OutputSettings:
    """Return the output settings for the checkpoints of a recipe.

    Beam search scores captions as transformers does, so that a run, its exported folder, `generate`
    and a pipeline generate the same captions. `evaluation.scoring` applies only to evaluations.
    """
    text, evaluation = recipe.model.text, recipe.evaluation
    return OutputSettings(
        prompt=text.prompt,
        num_beams=evaluation.num_beams,
        max_length=evaluation.max_caption_tokens,
        min_length=evaluation.min_caption_tokens,
        repetition_penalty=evaluation.repetition_penalty,
        scoring="huggingface",
        evaluation_scoring=evaluation.scoring,
        text_tokens=text.max_tokens,
        rerank_top_k=evaluation.rerank_top_k,
        label_smoothing=recipe.objective.label_smoothing,
    )


def check_pixels(source: Path, kind: Format) -> None:
    """Raise ValueError for a Hugging Face folder whose image processor differs from BLIP's.

    All networks here receive BLIP's pixels.
    """
    if kind != "hf":
        return
    wanted: dict[str, object] = {
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "resample": int(Image.Resampling.BICUBIC),
    }
    for name, value in pixel_settings(source).items():
        if value != wanted[name]:
            raise ValueError(
                f"{source}: its image processor has {name} {value}, BLIP has {wanted[name]}; such "
                "a checkpoint cannot be used here"
            )


def recipe_of(source: Path, kind: Format, chosen: str | None) -> Recipe | None:
    """Load the recipe with the sizes of a network; None if the checkpoint itself holds them.

    Args:
        source: path of the checkpoint.
        kind: format of the checkpoint.
        chosen: name or file of a recipe. None: recipe.yaml of the run.

    Raises:
        FileNotFoundError: recipe.yaml of the run is missing.
    """
    if chosen:
        return recipes.load(chosen)
    if kind != "ours":
        return None
    folder = step_folder(source)
    assert folder is not None
    if (folder / checkpoint_format.NETWORK).is_file():
        return None
    file = folder.parent.parent / run_folder.RECIPE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder}: the run's {run_folder.RECIPE} is not at {file}; give it with --recipe"
        )
    return _with_kept_text(recipes.load(str(file)), file.with_name(run_folder.TEXT))


def _with_kept_text(recipe: Recipe, folder: Path) -> Recipe:
    """Use the tokenizer and text sizes that the run stored, if there are any.

    The paths in the recipe may be from another machine.
    """
    if not (folder / "tokenizer_config.json").is_file() or not (folder / "config.json").is_file():
        return recipe
    text = recipe.model.text
    checkpoint = str(folder) if text.checkpoint else None
    text = replace(text, tokenizer=str(folder), checkpoint=checkpoint)
    return replace(recipe, model=replace(recipe.model, text=text))


def text_of(recipe: Recipe, tokenizer: str | None) -> TextRecipe:
    """Return the recipe's text settings, with `tokenizer` instead of theirs if it is given."""
    text = recipe.model.text
    return replace(text, tokenizer=tokenizer) if tokenizer else text


def tokenizer_beside(source: Path) -> str | None:
    """Return the folder of the tokenizer beside a checkpoint; None without one."""
    for folder in (source, source / "tokenizer", source / "captioning"):
        if (folder / "tokenizer_config.json").is_file():
            return str(folder)
    return None


def tokenizer_of(
    source: Path, config: MEDConfig, recipe: Recipe | None, chosen: str | None
) -> PreTrainedTokenizerFast:
    """Load the chosen tokenizer, else the recipe's, else that beside the checkpoint, else BLIP's.

    Raises:
        ValueError: the tokenizer cannot be loaded, or does not fit a network of these sizes.
    """
    if recipe:
        text = text_of(recipe, chosen)
    else:
        text = TextRecipe(tokenizer=chosen or tokenizer_beside(source) or PUBLISHED_TOKENIZER)
    try:
        tokenizer = load_tokenizer(text)
    except ValueError as error:
        raise ValueError(f"{error}; give --tokenizer FOLDER") from error
    if len(tokenizer) == config.text.vocab_size + 2:
        raise ValueError(
            f"{source} has word embeddings of {config.text.vocab_size} tokens, as many as the "
            f"tokenizer {text.tokenizer or text.checkpoint} has without [DEC] and [ENC], which "
            "BLIP needs: the checkpoint is not BLIP's, or incomplete"
        )
    if len(tokenizer) != config.text.vocab_size:
        raise ValueError(
            f"the tokenizer {text.tokenizer or text.checkpoint} has {len(tokenizer)} tokens with "
            f"[DEC] and [ENC], the network {config.text.vocab_size}; give its own with --tokenizer"
        )
    return tokenizer


def _resized(config: MEDConfig, image_size: int | None) -> MEDConfig:
    """Change the image size in the settings of a network; None changes nothing."""
    if image_size is None:
        return config
    return replace(config, vision=replace(config.vision, image_size=image_size))


def _filled(
    config: MEDConfig, weights: BlipWeights, device: torch.device, dtype: torch.dtype
) -> MED | VQA | NLVR2 | VisDial:
    """Build the network of the checkpoint's head in evaluation mode, with the parts it has."""
    with torch.device("meta"):
        network = build_network(weights.head, replace(config, gradient_checkpointing=False))
    assert isinstance(network, MED | VQA | NLVR2 | VisDial)
    state = parameters_of(weights)
    placed = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    placed = fitted_positions(placed, network.vision, "vision.")
    placed = {name: tensor.to(device, dtype) for name, tensor in placed.items()}
    if "lm_head.bias" in placed:
        words = "text_decoder" if isinstance(network, VQA) else "text"
        placed["lm_head.weight"] = placed[f"{words}.embeddings.word.weight"]
    network.load_state_dict(placed, assign=True)
    refill_constants(network, device)
    return network.eval().requires_grad_(False)


def _fingerprint(weights: BlipWeights) -> str:
    """Hash the weights. The hash is equal for every file format."""
    digest = xxhash.xxh3_64(weights.head.encode())
    tensors: dict[str, Tensor] = weights.state | weights.unpublished
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point() and name != "temp":  # Hugging Face files may lack `temp`
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
