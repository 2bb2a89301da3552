"""Convert BLIP checkpoints between formats, and export their encoders as ONNX.

The formats are training checkpoints, Salesforce .pth files and Hugging Face folders.

python tools/convert_checkpoint.py runs/demo captioner
python tools/convert_checkpoint.py runs/demo/checkpoints/step_00001000 blip.pth
python tools/convert_checkpoint.py model_base.pth retrieval --head retrieval
python tools/convert_checkpoint.py runs/demo encoders --to onnx
docs/checkpoints.md describes the formats and the possible conversions.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from blip_scale import logs
from blip_scale.commands.command_line import Parser, report_error, run_command
from blip_scale.config import exit_codes
from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe
from blip_scale.data.pixels.transforms import IMAGE_MEAN, IMAGE_STD
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.errors import RefusedInput
from blip_scale.inference.loading import (
    PUBLISHED_TOKENIZER,
    Loading,
    check_pixels,
    load_blip,
    output_of,
    recipe_of,
    text_of,
    tokenizer_of,
)
from blip_scale.inference.onnx_export import (
    IMAGE_ENCODER,
    ExportError,
    require_packages,
    write_onnx,
)
from blip_scale.inference.sizes import med_config
from blip_scale.interop import output_settings
from blip_scale.interop.blip_weights import (
    BlipWeights,
    published_alone,
    turned_into,
    with_training_state,
)
from blip_scale.interop.checkpoints import Format, format_of, read_checkpoint
from blip_scale.interop.huggingface import write_huggingface, write_processor
from blip_scale.interop.huggingface_config import inexpressible
from blip_scale.interop.model_card import Origin, model_card
from blip_scale.interop.salesforce_files import states_sizes, write_salesforce
from blip_scale.interop.training_checkpoints import step_folder, write_training_checkpoint
from blip_scale.model.heads import HEADS, Head
from blip_scale.model.med import MEDConfig
from blip_scale.storage import files, run_folder
from blip_scale.storage.output_files import check_apart, naming_full_disk
from blip_scale.storage.untrusted import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALL = "all"
_FILES = (".pth", ".pt")
"""Extensions with which OUT is a file, not a folder."""
_WRITTEN = re.compile(
    rf"(({'|'.join(HEADS)}|tokenizer)(/|$))?"
    r"((config|generation_config|processor_config|preprocessor_config|tokenizer|tokenizer_config"
    r"|special_tokens_map|added_tokens|manifest|network|output_settings)\.json"
    r"|vocab\.txt|README\.md|chat_template\.jinja|model[\w.-]*\.safetensors(\.index\.json)?"
    r"|(rank_\d+|shared)\.safetensors|(image|text)_encoder\.onnx[\w.]*)?"
)
"""Relative paths that a conversion writes into its folder."""
Target = Format | Literal["onnx"]
"""Format to write."""


def main(arguments: Sequence[str] | None = None, prog: str = "convert_checkpoint.py") -> int:
    """Run the command, and return its exit code: 0, or 2 for refused input."""
    options = _parser(prog).parse_args(arguments)
    try:
        return run_command(prog, lambda: _run(options))
    except ExportError as error:
        return report_error(prog, error)


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    target = _target(options)
    _check_free(options)
    if target == "onnx":
        _export(options)
    else:
        _convert(options, target)
    print(f"wrote {options.out} in {time.perf_counter() - started:.1f} s")
    return exit_codes.DONE


def _convert(options: argparse.Namespace, target: Format) -> None:
    kind = format_of(options.source)
    check_pixels(options.source, kind)
    recipe = recipe_of(options.source, kind, options.recipe)
    config = _network(recipe, options.tokenizer) if recipe else None
    weights = read_checkpoint(options.source, config)
    if recipe:
        weights.output = output_of(recipe)
    step = "" if weights.step is None else f", step {weights.step}"
    print(logs.printable(f"read {weights.origin}: {weights.head}{step}"))
    heads = _heads(options.head, weights, target)
    parts = [turned_into(weights, head) for head in heads]
    if target == "hf":
        tokenizer = tokenizer_of(options.source, weights.config, recipe, options.tokenizer)
        origin = _origin(options.source, kind, recipe)
        for part in parts:
            reason = inexpressible(part)
            if reason:
                raise ValueError(f"{part.origin} can't become a Hugging Face {part.head}: {reason}")
    elif target == "salesforce":
        parts = [with_training_state(part) for part in parts]
    # The notes concern training state, which Hugging Face models do not have.
    notes = [] if target == "hf" else list(parts[0].notes)
    if target == "hf" and weights.output_settings.scoring == "published":
        notes.append(
            "captions of the folder use the scoring of transformers' generate (huggingface), those "
            "of IN the published scoring; some captions differ"
        )
    if target != "ours":
        for index, part in enumerate(parts):
            parts[index] = published_alone(part)
            notes += parts[index].notes[len(part.notes) :]
    for note in dict.fromkeys(notes):
        print(logs.printable(f"note: {note}"))
    with _placed(options.out, folder=target != "salesforce") as place:
        if target == "salesforce":
            write_salesforce(parts[0], place)
        elif target == "ours":
            write_training_checkpoint(parts[0], place)
            if kind != "salesforce" or options.tokenizer or recipe:
                tokenizer = tokenizer_of(options.source, weights.config, recipe, options.tokenizer)
                tokenizer.save_pretrained(place / "tokenizer")
        else:
            for part in parts:
                folder = place / part.head if options.head == ALL else place
                _write_folder(part, folder, tokenizer, origin)


def _export(options: argparse.Namespace) -> None:
    """Export the image encoder and the text encoder as ONNX."""
    require_packages()
    loading = Loading(options.recipe, options.tokenizer, device="cpu", precision="fp32")
    blip = load_blip(options.source, loading)
    print(logs.printable(f"read {blip.origin}: {blip.head}"))
    with _placed(options.out, folder=True) as place:
        difference = write_onnx(blip, place)
    print(f"ONNX Runtime and the checkpoint: features differ by at most {difference:.1e}")


def _target(options: argparse.Namespace) -> Target:
    """Return the format to write, from --to or from the extension of OUT."""
    is_file = options.out.suffix in _FILES
    by_name: Target = "salesforce" if is_file else "hf"
    target: Target = options.to or by_name
    if target == "onnx" and options.head is not None:
        raise ValueError("--to onnx writes the two encoders and no head; leave --head out")
    if is_file != (target == "salesforce"):
        expected = "a name that ends in .pth" if not is_file else "the name of a folder"
        raise ValueError(f"{options.out}: --to {target} needs {expected}")
    if target != "hf" and options.head == ALL:
        raise ValueError("--head all writes Hugging Face folders; give --to hf")
    return target


def _heads(asked: str | None, weights: BlipWeights, target: Format) -> list[Head]:
    if target == "ours":
        if asked not in (None, "pretrain"):
            raise ValueError(
                f"--head {asked}: training checkpoints hold the whole network; leave --head out"
            )
        return ["pretrain"]
    if asked == ALL:
        heads: list[Head] = ["captioning", "retrieval"]
        try:
            vqa = turned_into(weights, "vqa")
            reason = inexpressible(vqa)
        except ValueError as error:
            reason = str(error)
        if reason:
            print(logs.printable(f"note: without vqa: {reason}"))
            return heads
        return [*heads, "vqa"]
    if asked is not None:
        return [head for head in HEADS if head == asked]
    return ["captioning"] if target == "hf" and weights.head == "pretrain" else [weights.head]


def _network(recipe: Recipe, tokenizer: str | None) -> MEDConfig:
    return med_config(recipe, load_tokenizer(text_of(recipe, tokenizer)))


def _origin(source: Path, kind: Format, recipe: Recipe | None) -> Origin:
    """Return the recipe and figures of the run that wrote a checkpoint, for the model card."""
    if kind != "ours" or recipe is None:
        return Origin()
    folder = step_folder(source)
    assert folder is not None
    summary = folder.parent.parent / run_folder.SUMMARY
    figures = parse_json(summary.read_bytes()) if summary.is_file() else {}
    return Origin(yaml.safe_load(recipes.to_yaml(recipe)), figures)


def _write_folder(
    weights: BlipWeights, folder: Path, tokenizer: PreTrainedTokenizerFast, origin: Origin
) -> None:
    """Write model, processor and model card in the format that transformers loads."""
    card = model_card(weights, origin)
    write_huggingface(weights, folder)
    tokenizer.model_max_length = weights.config.text.max_positions
    write_processor(folder, tokenizer, weights.config.vision.image_size, IMAGE_MEAN, IMAGE_STD)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _check_free(options: argparse.Namespace) -> None:
    """Refuse an OUT that exists, unless --overwrite is set and OUT is an earlier conversion.

    Raises:
        RefusedInput: OUT must not be replaced, or overlaps with the input.
    """
    out: Path = options.out
    format_of(options.source)  # refuses an IN that is not a checkpoint
    check_apart(out, options.source)
    if not out.exists():
        return
    if not options.overwrite:
        raise RefusedInput(f"{out} exists; give another name, or --overwrite")
    if out.is_dir() == (out.suffix in _FILES) or not _is_converted(out):
        raise RefusedInput(
            f"{out} is not a checkpoint that this command wrote, and is not overwritten; give "
            "another name"
        )
    others = [path for path in _entries(out) if not _WRITTEN.fullmatch(path)]
    if others:
        raise RefusedInput(
            f"{out} also holds {min(others)}, and is not overwritten; give another name"
        )


def _entries(folder: Path) -> list[str]:
    """Return all paths below a folder, relative to it."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _is_converted(path: Path) -> bool:
    """Return True if this command wrote the checkpoint.

    Such checkpoints contain their output settings or sizes.
    """
    if path.is_file():
        try:
            return states_sizes(path)
        except ValueError:  # not a .pth file, or a damaged one
            return False
    if (path / IMAGE_ENCODER).is_file() or (path / f"{output_settings.KEY}.json").is_file():
        return True
    files = [path / sub / "config.json" for sub in ("", *HEADS)]
    files = [file for file in files if file.is_file()]
    return bool(files) and all(_states_output(file) for file in files)


def _states_output(config: Path) -> bool:
    """Return True if the config.json of a Hugging Face folder contains output settings."""
    try:
        return output_settings.KEY in parse_json(config.read_bytes())
    except (ValueError, TypeError):
        return False


@contextmanager
def _placed(out: Path, folder: bool) -> Iterator[Path]:
    """Yield a temporary path, which replaces `out` at the end unless an error was raised.

    If `out` is a symbolic link, its target is replaced.
    """
    target = Path(os.path.realpath(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    place = work / "new"
    try:
        with naming_full_disk(out):
            if folder:
                place.mkdir()
            yield place
        for path in [place, *place.rglob("*")]:
            files.follow_umask(path)
        if folder and target.exists():
            target.rename(work / "old")
        place.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Convert a BLIP checkpoint. The format of IN is detected. OUT is written "
        "completely or not at all.",
        epilog="docs/checkpoints.md describes the formats and the possible conversions.",
    )
    parser.add_argument(
        "source", metavar="IN", type=Path,
        help="training checkpoint (step_N, or a run's folder for its newest), .pth, or Hugging "
        "Face folder",
    )  # fmt: skip
    parser.add_argument("out", metavar="OUT", type=Path, help="NAME.pth, or a folder")
    parser.add_argument(
        "--to", choices=("hf", "salesforce", "ours", "onnx"),
        help="format to write; default: salesforce for .pth, else hf. onnx: a folder with image "
        "encoder and text encoder, compared with the checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=(*HEADS, ALL),
        help="model to write; default: that of IN, or captioning from pretraining to hf. all: "
        "folders captioning, retrieval and, if possible, vqa in OUT",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE",
        help="recipe with the network's sizes, if IN lacks them; default: recipe.yaml of the run",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="FOLDER_OR_HUB_NAME",
        help=f"default: that of the recipe, else the one in IN, else {PUBLISHED_TOKENIZER}",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="delete an OUT that holds a conversion of this command and nothing else",
    )  # fmt: skip
    return parser
