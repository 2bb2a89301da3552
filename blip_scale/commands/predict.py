"""Ask a trained BLIP about images.

python tools/predict.py caption photos/ --model runs/captioner
python tools/predict.py vqa photo.jpg --model runs/vqa --question "what is the dog doing?"
python tools/predict.py match 'photos/*.jpg' --model runs/filter --text "a dog" --text "two cats"
python tools/predict.py embed photos/ --model runs/filter --out features.npz
python tools/predict.py search photos/ --model runs/filter --text "a dog in the snow" --top 5
python tools/predict.py explain photo.jpg --model runs/demo --text "a dog in the snow"
IMAGES are files, folders (with everything below) and globs. Each answer is a line of JSON. An image
that cannot be decoded gives a line with `error`, and the command ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blip_scale import logs
from blip_scale.commands.command_line import Parser, check_least, run_command
from blip_scale.config import exit_codes
from blip_scale.data.pixels.decoding import decode_image
from blip_scale.inference import predictions
from blip_scale.inference.blip import Use, require_head
from blip_scale.inference.heat_sheet import draw_sheet
from blip_scale.inference.images import find_images
from blip_scale.inference.loading import Loading, load_blip, output_of, recipe_of
from blip_scale.inference.predictions import Answer, CaptionSettings, Reader
from blip_scale.inference.word_maps import WordMaps
from blip_scale.interop.checkpoints import format_of
from blip_scale.interop.output_settings import OutputSettings
from blip_scale.interop.training_checkpoints import step_folder
from blip_scale.model.generation import BeamSettings, NucleusSettings
from blip_scale.storage.output_files import (
    OVERWRITE_HELP,
    check_output,
    is_stream,
    written_whole,
)

_LEAST = {
    "batch_size": 1,
    "threads": 1,
    "image_size": 1,
    "beams": 1,
    "captions": 1,
    "max_tokens": 2,
    "min_tokens": 0,
    "seed": 0,
    "top": 1,
    "rerank": 0,
}
"""Option name, with underscores -> smallest value allowed."""
_USES: dict[str, Use] = {
    "caption": "caption",
    "vqa": "vqa",
    "match": "match",
    "embed": "embed",
    "search": "embed",
    "explain": "match",
}
"""Verb of the command line -> use that the checkpoint must serve."""


def main(arguments: Sequence[str] | None = None, prog: str = "predict.py") -> int:
    """Run the command, and return its exit code.

    It is 0, 1 if images failed, and 2 for refused input.
    """
    options = _parser(prog).parse_args(arguments)
    return run_command(prog, lambda: _predict(options))


def _predict(options: argparse.Namespace) -> int:
    _check(options)
    paths = find_images(options.images)
    if options.out:
        _check_name(options.out, options.use)
        model = step_folder(options.model) or options.model
        inputs = [*paths, model, *filter(None, (options.recipe, options.tokenizer))]
        check_output(options.out, options.overwrite, inputs)
    _check_run(options)
    loading = Loading(
        options.recipe, options.tokenizer, options.image_size, options.device, options.precision
    )
    reader = Reader(load_blip(options.model, loading), options.batch_size, options.threads)
    failed, seen = [], set()
    with _output(options) as write, tqdm(total=len(paths), unit="image") as bar:
        for answer in _answers(reader, paths, options):
            if "error" in answer:
                failed.append(answer["image"])
            bar.update(answer["image"] not in seen)
            seen.add(answer["image"])
            write(answer)
        bar.update(len(paths) - bar.n)  # a search reads all images but returns only the best
    if failed:
        names = ", ".join(failed[:5]) + (" ..." if len(failed) > 5 else "")
        message = f"{len(failed)} of {len(paths)} images failed: {names}"
        print(logs.printable(message), file=sys.stderr)
    return exit_codes.FAILED if failed else exit_codes.DONE


def _answers(reader: Reader, paths: Sequence[str], options: argparse.Namespace) -> Iterator[Answer]:
    """Return the answers of the chosen verb."""
    if options.use == "caption":
        decoding = _decoding(options, reader.blip.output)
        settings = CaptionSettings(decoding, options.prompt, options.seed, options.captions)
        return predictions.captions(reader, paths, settings)
    if options.use == "vqa":
        return predictions.replies(reader, paths, options.question)
    if options.use == "match":
        return predictions.matches(reader, paths, options.text)
    if options.use == "embed":
        return predictions.features(reader, paths)
    if options.use == "explain":
        return _explain(reader, paths, options)
    return predictions.search(reader, paths, options.text, options.top, options.rerank)


def _explain(reader: Reader, paths: Sequence[str], options: argparse.Namespace) -> Iterator[Answer]:
    """Draw a sheet for every image. Each answer names the file of its sheet."""
    answers = predictions.explanations(reader, paths, options.text)
    options.sheets.mkdir(parents=True, exist_ok=True)
    taken = {Path(path).resolve() for path in paths}
    for answer in answers:
        if "error" not in answer:
            maps: WordMaps = answer.pop("maps")
            image = decode_image(Path(answer["image"]).read_bytes(), upright=True)
            file = _free_name(options.sheets, Path(answer["image"]).stem, taken)
            draw_sheet(image, maps).save(file)
            answer |= {"words": maps.words, "sheet": str(file)}
        yield answer


def _free_name(folder: Path, stem: str, taken: set[Path]) -> Path:
    """Return an unused path for a sheet, and add it to `taken`.

    `taken` holds the input images and the sheets already drawn by this command.
    """
    file, number = folder / f"{stem}.words.png", 1
    while file.resolve() in taken:
        number += 1
        file = folder / f"{stem}_{number}.words.png"
    taken.add(file.resolve())
    return file


def _check_name(out: Path, use: str) -> None:
    """Refuse an output file whose extension does not fit its content.

    Raises:
        ValueError: the extension does not fit.
    """
    if is_stream(out) or out.suffix in ("", ".jsonl") or (out.suffix == ".npz" and use == "embed"):
        return
    if out.suffix == ".npz":
        raise ValueError(f"{out}: only features go into an .npz; give a name that ends in .jsonl")
    arrays = ", or in .npz for arrays" if use == "embed" else ""
    raise ValueError(f"{out}: answers are lines of JSON; give a name that ends in .jsonl{arrays}")


def _check(options: argparse.Namespace) -> None:
    """Check the numeric options.

    Raises:
        ValueError: a value is out of range, or contradicts another option.
    """
    check_least(options, _LEAST)
    if options.use != "caption":
        return
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p {options.top_p}: expected a share above 0, at most 1")
    if options.captions > 1 and options.beams == 1 and not options.sample:
        raise ValueError("--captions of greedy search (--beams 1): give --sample or more --beams")


def _check_run(options: argparse.Namespace) -> None:
    """Check the options against the recipe of the run, before the weights are read.

    Raises:
        ValueError: the run trained another head, or its beam width is too small.
    """
    kind = format_of(options.model)
    recipe = recipe_of(options.model, kind, None) if kind == "ours" and not options.recipe else None
    if recipe is None:
        return
    require_head(str(options.model), recipe.task, _USES[options.use])
    if options.use == "caption":
        _decoding(options, output_of(recipe))


def _decoding(
    options: argparse.Namespace, output: OutputSettings
) -> BeamSettings | NucleusSettings:
    """Return the checkpoint's decoding settings, overridden by the options of the command.

    Raises:
        ValueError: more captions are requested than beam search finds.
    """
    options_of_beam = {
        "max_length": options.max_tokens,
        "min_length": options.min_tokens,
        "num_beams": options.beams,
        "scoring": options.scoring,
    }
    stated = {name: value for name, value in options_of_beam.items() if value is not None}
    beam = replace(output.beam(), **stated)
    if options.sample:
        return NucleusSettings(
            top_p=options.top_p, max_length=beam.max_length, min_length=beam.min_length
        )
    if options.captions > beam.num_beams:
        raise ValueError(
            f"--captions {options.captions}: beam search of width {beam.num_beams} finds 1 to "
            f"{beam.num_beams} captions of an image; give more --beams, or --sample"
        )
    return beam


def _line(answer: Answer) -> str:
    """Format an answer as JSON, without escaping non-ASCII text.

    Bytes of a path that are not UTF-8 are escaped. Python's json and os.fsencode restore them.
    """
    text = json.dumps(answer, ensure_ascii=False)
    return logs.printable(text.encode(errors="backslashreplace").decode())


@contextmanager
def _output(options: argparse.Namespace) -> Iterator[Callable[[Answer], None]]:
    """Yield a function that writes an answer to stdout, a JSON lines file, or an .npz file."""
    out: Path | None = options.out
    if out is None:
        yield lambda answer: print(_line(answer), flush=True)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as place:
        if out.suffix != ".npz":
            with place.open("w", encoding="utf-8") as lines:
                yield lambda answer: print(_line(answer), file=lines)
            return
        rows: list[Answer] = []
        yield rows.append
        good = [row for row in rows if "error" not in row]
        for row in rows:
            if "error" in row:
                print(_line(row), flush=True)
        with place.open("wb") as file:
            np.savez(
                file,
                images=np.array([row["image"] for row in good], np.str_),
                features=np.array([row["features"] for row in good], np.float32),
            )


def _parser(prog: str) -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    uses = parser.add_subparsers(dest="use", required=True, metavar="VERB")
    shared = _shared_options()

    def use(name: str, text: str) -> Parser:
        return uses.add_parser(name, help=text, description=text, parents=[shared])

    _add_caption_options(use("caption", "write a caption of every image"))
    vqa = use("vqa", "answer questions about every image")
    vqa.add_argument("--question", action="append", required=True, help="repeat it for several")
    match = use("match", "matching probability (itm) and cosine (itc) of every image and text")
    match.add_argument("--text", action="append", required=True, help="repeat it for several")
    use("embed", "features of every image, of norm 1; with --out NAME.npz as arrays")
    search = use("search", "find the images that fit a text best")
    search.add_argument("--text", required=True, help="what to look for")
    _add(search, "--top", 10, "number of images to return")
    _add(search, "--rerank", 0, "number of best images to re-rank by matching probability; 0: none")
    explain = use("explain", "draw a heat map for each word of a caption, a PNG for every image")
    explain.add_argument("--text", help="caption to look for; default: the checkpoint's own")
    explain.add_argument(
        "--sheets", type=Path, default=Path("word_maps"), metavar="FOLDER",
        help="folder of the PNG files, named after the images; sheets of an earlier call are "
        "replaced (%(default)s)",
    )  # fmt: skip
    return parser


def _add_caption_options(caption: Parser) -> None:
    default = "default: the checkpoint's"
    caption.add_argument(
        "--beams", type=int, help=f"width of the beam search; 1 is greedy; {default}"
    )
    caption.add_argument(
        "--scoring", choices=("published", "huggingface"),
        help="length that beam search divides by: as for BLIP's figures, or as in transformers' "
        "generate; default: published for BLIP's own files, else huggingface",
    )  # fmt: skip
    _add(caption, "--captions", 1, "captions of each image: the best, or with --sample as drawn")
    caption.add_argument(
        "--sample", action="store_true", help="nucleus sampling instead of beam search"
    )
    _add(caption, "--top-p", 0.9, "share of the probability that nucleus sampling draws from")
    _add(caption, "--seed", 0, "seed of nucleus sampling; with an image's path it fixes a caption")
    caption.add_argument(
        "--max-tokens", type=int,
        help=f"longest caption in tokens, including prompt and [SEP]; {default}",
    )  # fmt: skip
    caption.add_argument(
        "--min-tokens",
        type=int,
        help=f"shortest caption in tokens, including the prompt; {default}",
    )
    caption.add_argument(
        "--prompt",
        help=f'first words of a caption; {default} ("a picture of " for BLIP\'s captioners)',
    )


def _shared_options() -> Parser:
    """Return a parser with the options that all verbs share."""
    shared = Parser(add_help=False)
    shared.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs")
    shared.add_argument(
        "--model", required=True, type=Path, metavar="CHECKPOINT",
        help="a run's folder, step_N, BLIP's .pth, or a Hugging Face folder",
    )  # fmt: skip
    shared.add_argument(
        "--out", type=Path, metavar="FILE",
        help="file of the answers: NAME.jsonl, or NAME.npz for embed; default: stdout",
    )  # fmt: skip
    shared.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    shared.add_argument(
        "--recipe",
        help="recipe with the sizes of the network, if the checkpoint does not hold them",
    )
    shared.add_argument("--tokenizer", help="default: the recipe's, or the one beside the model")
    shared.add_argument("--image-size", type=int, help="pixels; default: the checkpoint's")
    shared.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    shared.add_argument(
        "--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU"
    )
    _add(shared, "--batch-size", 32, "images in a batch; does not change the answers")
    _add(shared, "--threads", 4, "threads that decode images")
    return shared


def _add(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    """Add an option with the type of its default. The help shows the default."""
    parser.add_argument(name, type=type(default), default=default, help=text + " (%(default)s)")
