"""Reader and writer of Hugging Face BLIP folders."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from blip_scale.interop import output_settings
from blip_scale.interop.blip_weights import (
    BlipWeights,
    checked,
    one_line,
    refuse_unpublished,
    united,
    without_training_state,
)
from blip_scale.interop.huggingface_config import CLASSES, blip_config, inexpressible, med_config
from blip_scale.interop.huggingface_names import from_huggingface, to_huggingface
from blip_scale.interop.output_settings import OutputSettings
from blip_scale.interop.salesforce import State
from blip_scale.model.heads import Head
from blip_scale.model.med import MEDConfig

if TYPE_CHECKING:
    from transformers import BlipConfig, PreTrainedModel, PreTrainedTokenizerFast


def read_huggingface(folder: Path) -> BlipWeights:
    """Read a folder with a model of transformers.

    The folder may instead hold the two models `captioning/` and `retrieval/`, which together form a
    whole MED.

    Raises:
        ValueError: the model is not BLIP, its activation, names or shapes differ, files are
            damaged, or the two models are not halves of one network.
        FileNotFoundError: config.json or the weights are missing.
    """
    if not (folder / "config.json").is_file():
        captioning, retrieval = map(read_huggingface, _halves(folder))
        return united(captioning, retrieval, str(folder))
    head, hf_config = _read_config(folder)
    config = med_config(hf_config, str(folder))
    state = from_huggingface(_load(folder, CLASSES[head]))
    if head == "retrieval" and getattr(hf_config, "itc_temperature", None) is not None:
        state["temp"] = torch.tensor(hf_config.itc_temperature)
    step = getattr(hf_config, "training_steps", None)
    output = _output_of(folder, getattr(hf_config, output_settings.KEY, None))
    return checked(BlipWeights(head, config, state, str(folder), step, output=output))


def read_sizes(folder: Path) -> MEDConfig:
    """Read the sizes of a folder's network without its weights.

    Raises:
        ValueError, FileNotFoundError: see `read_huggingface`.
    """
    if not (folder / "config.json").is_file():
        folder = _halves(folder)[0]
    return med_config(_read_config(folder)[1], str(folder))


def _halves(folder: Path) -> list[Path]:
    halves = [folder / "captioning", folder / "retrieval"]
    if not all((half / "config.json").is_file() for half in halves):
        raise FileNotFoundError(
            f"{folder}: no config.json there (nor captioning/ and retrieval/ with one each)"
        )
    return halves


def _read_config(folder: Path) -> tuple[Head, BlipConfig]:
    from transformers import AutoConfig, BlipConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/config.json can't be read: {one_line(error)}") from error
    name = (config.architectures or ["a model without a name"])[0]
    head = next((head for head, class_name in CLASSES.items() if class_name == name), None)
    if head is None or not isinstance(config, BlipConfig):
        raise ValueError(
            f"{folder} holds {name} ({config.model_type}); expected {', '.join(CLASSES.values())}"
        )
    return head, config


def _output_of(folder: Path, stated: Mapping[str, Any] | None) -> OutputSettings | None:
    """Read the output settings of a folder that this package wrote; None for other folders.

    The published captions of other folders do not follow their generation_config.json.
    """
    if stated is None:
        return None
    try:
        settings = output_settings.from_json(stated)
        file = folder / "generation_config.json"
        if file.is_file():  # retrieval models have no such file
            values = json.loads(file.read_text(encoding="utf-8"))
            settings = settings.with_generation_config(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from error
    return settings


def pixel_settings(folder: Path) -> dict[str, Any]:
    """Read `image_mean`, `image_std` and `resample` of a folder's image processor.

    The processor may be in the subfolder `captioning/`. The result is empty if there is none.

    Raises:
        ValueError: a file is not a JSON object.
    """
    for place in (folder, folder / "captioning"):
        for name in ("preprocessor_config.json", "processor_config.json"):
            file = place / name
            if not file.is_file():
                continue
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
                values = values.get("image_processor", values)
                names = ("image_mean", "image_std", "resample")
                return {key: values[key] for key in names if values.get(key) is not None}
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{file} is damaged: {one_line(error)}") from error
    return {}


def write_huggingface(weights: BlipWeights, folder: Path) -> None:
    """Write weights (safetensors), config and generation config to an empty folder.

    The function empties `weights.state` tensor by tensor, so that memory never holds two copies.

    Raises:
        ValueError: transformers' model cannot hold this network, or has no name for some
            parameters. The message says why.
    """
    import transformers

    refuse_unpublished(weights)
    reason = inexpressible(weights)
    if reason:
        raise ValueError(f"{weights.origin} can't become a Hugging Face {weights.head}: {reason}")
    config = blip_config(weights)
    generation = weights.output_settings.generation_config(weights.config.text.max_positions)
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[weights.head])(config)
    state = without_training_state(weights.state)
    weights.state = {}
    parameters = {}
    for name in list(state):
        if name != "temp":  # clone: safetensors refuses tensors that share memory
            parameters.update(to_huggingface({name: state.pop(name).clone()}))
    model.load_state_dict(parameters, strict=True, assign=True)
    model.tie_weights()
    model.eval()
    _save(model, weights.config, generation, folder)


def _save(
    model: PreTrainedModel, config: MEDConfig, generation: Mapping[str, Any], folder: Path
) -> None:
    """Save the model and its generation settings.

    In transformers 4, pipelines read `generation` from generation_config.json, and the decoder of
    `generate` reads it from the text config. Transformers 5 ignores the text config, so its users
    must set it on the decoder (`model_card`). All values are written, because each version of
    transformers omits its own defaults.
    """
    from transformers import GenerationConfig

    special = config.text.special
    is_writer = model.can_generate()
    if is_writer:
        model.generation_config = GenerationConfig(
            bos_token_id=special.dec,
            eos_token_id=special.sep,
            pad_token_id=special.pad,
        )
    with _quiet():
        model.save_pretrained(folder)
    if is_writer:
        for name, section in (("config.json", "text_config"), ("generation_config.json", None)):
            file = folder / name
            values = json.loads(file.read_text(encoding="utf-8"))
            (values[section] if section else values).update(generation)
            file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_processor(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    image_size: int,
    mean: Sequence[float],
    deviation: Sequence[float],
) -> None:
    """Write the files that BlipProcessor reads in transformers 4.57 and 5.

    Transformers 5 no longer writes preprocessor_config.json and vocab.txt, which 4.57 reads with
    `use_fast=False`. It also saves additional special tokens as a list, under a name for which 4.57
    expects a mapping.

    Raises:
        ValueError: BlipProcessor rejects the tokenizer, because it is not a BERT tokenizer.
    """
    from transformers import BlipImageProcessor, BlipProcessor

    size = {"height": image_size, "width": image_size}
    pixels = BlipImageProcessor(size=size, image_mean=mean, image_std=deviation)
    try:
        BlipProcessor(pixels, tokenizer).save_pretrained(folder)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"BlipProcessor accepts BERT tokenizers only, not {type(tokenizer).__name__}: {error}"
        ) from error
    pixels.save_pretrained(folder)
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    # BLIP has no token types, and pipelines of 4.57 fail if they get some.
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings.

    The warnings would advise to train a network that is refused anyway.
    """
    from transformers.utils import logging as their_logging

    verbosity = their_logging.get_verbosity()
    bars = their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.set_verbosity(verbosity)
        if bars:
            their_logging.enable_progress_bar()


def _load(folder: Path, name: str) -> State:
    """Load a state dict with transformers, and refuse one that does not match the model."""
    import transformers

    try:
        with _quiet():
            model, report = getattr(transformers, name).from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, dtype="float32"
            )
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        kind = FileNotFoundError if "no file named" in str(error) else ValueError
        raise kind(f"{folder} can't be read: {one_line(error)}") from error
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: damaged or unsafe weights: {one_line(error)}") from error
    state = dict(model.state_dict())
    # transformers 4 reports names; 5 reports tuples (name, shape in the file, shape in the model).
    mismatched = sorted(k if isinstance(k, str) else k[0] for k in report["mismatched_keys"])
    wrong = [f"{key}, wanted {tuple(state[key].shape)}" for key in mismatched]
    unknown = sorted(n for n in report["unexpected_keys"] if not n.endswith("position_ids"))
    problems = {
        "missing": sorted(report["missing_keys"]), "left over": unknown, "of another shape": wrong,
    }  # fmt: skip
    if any(problems.values()):
        text = "; ".join(
            f"{kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names
        )
        raise ValueError(f"{folder} does not hold a complete {name}: {text}")
    return state
