"""Convert a BLIP checkpoint: ours, Salesforce's .pth, Hugging Face folders; any to any.

python tools/convert_checkpoint.py runs/demo captioner
python tools/convert_checkpoint.py runs/demo/checkpoints/step_00001000 blip.pth
python tools/convert_checkpoint.py model_base.pth retrieval --head retrieval
docs/tasks.md tells what each format holds and what can become what.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from blip_scale import logs
from blip_scale.commands.command_line import Parser, report_error
from blip_scale.config import recipe as recipes
from blip_scale.config.recipe import Recipe
from blip_scale.data.pixels.transforms import IMAGE_MEAN, IMAGE_STD
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.inference.loading import (
    PUBLISHED_TOKENIZER,
    check_pixels,
    output_of,
    recipe_of,
    text_of,
    tokenizer_of,
)
from blip_scale.inference.sizes import med_config
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
from blip_scale.interop.salesforce_files import write_salesforce
from blip_scale.interop.training_checkpoints import step_folder, write_training_checkpoint
from blip_scale.model.heads import HEADS, Head
from blip_scale.model.med import MEDConfig
from blip_scale.storage import files, run_folder
from blip_scale.storage.untrusted import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALL = "all"


def main(arguments: Sequence[str] | None = None, prog: str = "convert_checkpoint.py") -> int:
    """Returns the exit code: 0, or 2 for refused input, which is said in one line."""
    options = _parser(prog).parse_args(arguments)
    started = time.perf_counter()
    try:
        _convert(options)
    except (ValueError, OSError) as error:
        return report_error(prog, error)
    print(f"wrote {options.out} in {time.perf_counter() - started:.1f} s")
    return 0


def _convert(options: argparse.Namespace) -> None:
    kind = format_of(options.source)
    check_pixels(options.source, kind)
    target = _target(options)
    _check_free(options.out, options.overwrite)
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
    # Hugging Face's models have no place for what these notes are about.
    notes = [] if target == "hf" else list(parts[0].notes)
    if target == "hf" and weights.output_settings.scoring == "published":
        notes.append(
            "captions of the folder are scored as by transformers' generate (huggingface), those "
            "of IN as published; some differ"
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


def _target(options: argparse.Namespace) -> Format:
    """The format to write: what --to says, else what the name of OUT says."""
    is_file = options.out.suffix in (".pth", ".pt")
    by_name: Format = "salesforce" if is_file else "hf"
    target: Format = options.to or by_name
    if is_file != (target == "salesforce"):
        mend = "a name that ends in .pth" if not is_file else "the name of a folder"
        raise ValueError(f"{options.out}: --to {target} writes to {mend}")
    if target != "hf" and options.head == ALL:
        raise ValueError("--head all makes Hugging Face folders; give --to hf")
    return target


def _heads(asked: str | None, weights: BlipWeights, target: Format) -> list[Head]:
    if target == "ours":
        if asked not in (None, "pretrain"):
            raise ValueError(
                f"--head {asked}: our checkpoints hold the whole network; leave it out"
            )
        return ["pretrain"]
    if asked == ALL:
        found: list[Head] = ["captioning", "retrieval"]
        try:
            vqa = turned_into(weights, "vqa")
            reason = inexpressible(vqa)
        except ValueError as error:
            reason = str(error)
        if reason:
            print(logs.printable(f"note: without vqa: {reason}"))
            return found
        return [*found, "vqa"]
    if asked is not None:
        return [head for head in HEADS if head == asked]
    return ["captioning"] if target == "hf" and weights.head == "pretrain" else [weights.head]


def _network(recipe: Recipe, tokenizer: str | None) -> MEDConfig:
    return med_config(recipe, load_tokenizer(text_of(recipe, tokenizer)))


def _origin(source: Path, kind: Format, recipe: Recipe | None) -> Origin:
    """What the files of a run say, for the model card."""
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
    """Model, processor and card, as transformers loads them."""
    card = model_card(weights, origin)
    write_huggingface(weights, folder)
    tokenizer.model_max_length = weights.config.text.max_positions
    write_processor(folder, tokenizer, weights.config.vision.image_size, IMAGE_MEAN, IMAGE_STD)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _check_free(out: Path, overwrite: bool) -> None:
    """OUT isn't there; or --overwrite, and it is a checkpoint."""
    if not out.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists; give another name, or --overwrite")
    if out.is_dir():
        try:
            format_of(out)
        except ValueError as error:
            raise FileExistsError(
                f"{out} is a folder of something else: not overwritten"
            ) from error


@contextmanager
def _placed(out: Path, folder: bool) -> Iterator[Path]:
    """A path to write to that takes the place of `out` when all is written, and not before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    place = work / "new"
    try:
        if folder:
            place.mkdir()
        yield place
        for path in [place, *place.rglob("*")]:
            files.follow_umask(path)
        if folder and out.exists():
            out.rename(work / "old")
        place.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Convert a BLIP checkpoint. What IN is, is found by looking at it; OUT is "
        "written whole or not at all.",
        epilog="docs/tasks.md tells what each format holds and what can become what.",
    )
    parser.add_argument(
        "source", metavar="IN", type=Path,
        help="training checkpoint (step_N, or a run's folder: its newest), .pth, or Hugging Face "
        "folder",
    )  # fmt: skip
    parser.add_argument("out", metavar="OUT", type=Path, help="NAME.pth, or a folder")
    parser.add_argument(
        "--to", choices=("hf", "salesforce", "ours"),
        help="default: salesforce for .pth, else hf",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=(*HEADS, ALL),
        help="which model; default: that of IN, and captioning from pretraining to hf; all: "
        "folders captioning, retrieval and (where it can be) vqa in OUT",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE",
        help="the network's sizes, where IN doesn't say them; default: recipe.yaml of the run",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="FOLDER_OR_HUB_NAME",
        help=f"default: the recipe's, the one in IN, {PUBLISHED_TOKENIZER}",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    return parser
