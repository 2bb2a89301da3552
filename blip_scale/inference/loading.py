"""Any BLIP checkpoint, made ready to be asked: recipe, tokenizer and network found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from PIL import Image
from torch import Tensor

from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe, TextRecipe
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
from blip_scale.interop.vision import interpolate_positions
from blip_scale.model.heads import build_network
from blip_scale.model.med import MED, MEDConfig
from blip_scale.model.nlvr2 import NLVR2
from blip_scale.model.visdial import VisDial
from blip_scale.model.vqa import VQA
from blip_scale.storage import checkpoint_format, run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PUBLISHED_TOKENIZER = "bert-base-uncased"


@dataclass(frozen=True)
class Loading:
    """What a checkpoint doesn't say, or is to be otherwise."""

    recipe: str | None = None
    """Name or file of the recipe with the network's sizes; None: recipe.yaml of the run."""
    tokenizer: str | None = None
    """Folder or hub name; None: the recipe's, the one beside the checkpoint, the published one."""
    image_size: int | None = None
    """Pixels; position embeddings are interpolated. None: that of the checkpoint."""
    device: str | None = None
    """None: the GPU if there is one."""
    precision: str | None = None
    """`bf16` or `fp32`; None: bf16 on a GPU, fp32 on the CPU."""


def load_blip(source: Path, loading: Loading | None = None) -> Blip:
    """The network in a checkpoint of any kind, on its device, with its tokenizer.

    Raises:
        FileNotFoundError: nothing is there, or a part of it is missing.
        ValueError: not BLIP, damaged, unsafe, of a kind that can't be asked, or with another's
            tokenizer.
    """
    loading = loading or Loading()
    kind = format_of(source)
    check_pixels(source, kind)
    recipe = recipe_of(source, kind, loading.recipe)
    config = None
    if recipe:
        text = text_of(recipe, loading.tokenizer)
        config = med_config(recipe, load_tokenizer(text))
    weights = read_checkpoint(source, config, with_state=False)
    tokenizer = tokenizer_of(source, weights.config, recipe, loading.tokenizer)
    device = torch.device(loading.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = loading.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
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
    )


def output_of(recipe: Recipe) -> OutputSettings:
    """What a recipe says of the output of its checkpoints.

    Captions are scored as by transformers, so that a run, its exported folder, `generate` and a
    pipeline write the same ones; `evaluation.scoring` is for figures.
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
    """Raise ValueError for a Hugging Face folder whose image processor makes other pixels than
    BLIP's, with which every network here is fed."""
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
                f"{source}: its image processor has {name} {value}, BLIP has {wanted[name]}; "
                "other pixels would change what it says"
            )


def recipe_of(source: Path, kind: Format, given: str | None) -> Recipe | None:
    """The recipe that says a network's sizes: the given one, else the one that a run wrote; None
    where the checkpoint says them itself.

    Raises:
        FileNotFoundError: a run's checkpoint without its recipe.
    """
    if given:
        return recipes.load(given)
    if kind != "ours":
        return None
    folder = step_folder(source)
    assert folder is not None
    if (folder / checkpoint_format.NETWORK).is_file():
        return None
    file = folder.parent.parent / run_folder.RECIPE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder}: the run's {run_folder.RECIPE} isn't at {file}; give it with --recipe"
        )
    return _with_kept_text(recipes.load(str(file)), file.with_name(run_folder.TEXT))


def _with_kept_text(recipe: Recipe, folder: Path) -> Recipe:
    """With tokenizer and text sizes that the run kept: the recipe's own paths may be those of
    another machine."""
    if not (folder / "tokenizer_config.json").is_file() or not (folder / "config.json").is_file():
        return recipe
    text = recipe.model.text
    checkpoint = str(folder) if text.checkpoint else None
    text = replace(text, tokenizer=str(folder), checkpoint=checkpoint)
    return replace(recipe, model=replace(recipe.model, text=text))


def text_of(recipe: Recipe, tokenizer: str | None) -> TextRecipe:
    """The recipe's text settings, with another tokenizer where one is given."""
    text = recipe.model.text
    return replace(text, tokenizer=tokenizer) if tokenizer else text


def tokenizer_beside(source: Path) -> str | None:
    """The folder with the tokenizer of a checkpoint, if it has one."""
    for folder in (source, source / "tokenizer", source / "captioning"):
        if (folder / "tokenizer_config.json").is_file():
            return str(folder)
    return None


def tokenizer_of(
    source: Path, config: MEDConfig, recipe: Recipe | None, given: str | None
) -> PreTrainedTokenizerFast:
    """The given tokenizer, else the recipe's, else the one beside the checkpoint, else the
    published one.

    Raises:
        ValueError: it can't be loaded, or isn't that of a network of these sizes.
    """
    if recipe:
        text = text_of(recipe, given)
    else:
        text = TextRecipe(tokenizer=given or tokenizer_beside(source) or PUBLISHED_TOKENIZER)
    try:
        tokenizer = load_tokenizer(text)
    except ValueError as error:
        raise ValueError(f"{error}; give --tokenizer FOLDER") from error
    if len(tokenizer) == config.text.vocab_size + 2:
        raise ValueError(
            f"{source} has word embeddings of {config.text.vocab_size} tokens, as many as the "
            f"tokenizer {text.tokenizer or text.checkpoint} has without [DEC] and [ENC], which "
            "BLIP needs: it is no BLIP, or isn't whole"
        )
    if len(tokenizer) != config.text.vocab_size:
        raise ValueError(
            f"the tokenizer {text.tokenizer or text.checkpoint} has {len(tokenizer)} tokens with "
            f"[DEC] and [ENC], the network {config.text.vocab_size}; give --tokenizer"
        )
    return tokenizer


def _resized(config: MEDConfig, image_size: int | None) -> MEDConfig:
    if image_size is None:
        return config
    return replace(config, vision=replace(config.vision, image_size=image_size))


def _filled(
    config: MEDConfig, weights: BlipWeights, device: torch.device, dtype: torch.dtype
) -> MED | VQA | NLVR2 | VisDial:
    """The network of the checkpoint's head in evaluation mode, without what the head lacks."""
    with torch.device("meta"):
        network = build_network(weights.head, replace(config, gradient_checkpointing=False))
    assert isinstance(network, MED | VQA | NLVR2 | VisDial)
    state = parameters_of(weights)
    placed = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    vision = network.vision
    if vision.pos_embed is not None:
        extra = vision.pos_embed.shape[1] - vision.patch_embed.num_patches
        placed["vision.pos_embed"] = interpolate_positions(
            placed["vision.pos_embed"], vision.patch_embed.grid_size, extra
        )
    placed = {name: tensor.to(device, dtype) for name, tensor in placed.items()}
    if "lm_head.bias" in placed:
        words = "text_decoder" if isinstance(network, VQA) else "text"
        placed["lm_head.weight"] = placed[f"{words}.embeddings.word.weight"]
    network.load_state_dict(placed, assign=True)
    return network.eval().requires_grad_(False)


def _fingerprint(weights: BlipWeights) -> str:
    """A hash of the weights, the same whatever file format they were read from."""
    digest = xxhash.xxh3_64(weights.head.encode())
    tensors: dict[str, Tensor] = weights.state | weights.unpublished
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point() and name != "temp":  # which Hugging Face's may lack
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
