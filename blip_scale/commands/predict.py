"""Ask a trained BLIP about images.

python tools/predict.py caption photos/ --model runs/captioner
python tools/predict.py vqa photo.jpg --model runs/vqa --question "what is the dog doing?"
python tools/predict.py match 'photos/*.jpg' --model runs/filter --text "a dog" --text "two cats"
python tools/predict.py embed photos/ --model runs/filter --out features.npz
python tools/predict.py search photos/ --model runs/filter --text "a dog in the snow" --top 5
IMAGES are files, folders (everything below) and globs. Each answer is a line of JSON; an image that
can't be decoded gives a line with `error`, and the exit code 1 at the end.
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
from blip_scale.commands.command_line import Parser, report_error
from blip_scale.config import exit_codes
from blip_scale.inference import predictions
from blip_scale.inference.images import find_images
from blip_scale.inference.loading import Loading, load_blip
from blip_scale.inference.predictions import Answer, CaptionSettings, Reader
from blip_scale.interop.output_settings import OutputSettings
from blip_scale.model.generation import BeamSettings, NucleusSettings

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
"""Options -> the least number that they take."""


def main(arguments: Sequence[str] | None = None, prog: str = "predict.py") -> int:
    """Returns the exit code: 0, 1 where images failed, 2 where nothing could be done."""
    options = _parser(prog).parse_args(arguments)
    try:
        return _predict(options)
    except (OSError, ValueError) as error:
        return report_error(prog, error)


def _predict(options: argparse.Namespace) -> int:
    _check(options)
    paths = find_images(options.images)
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
        bar.update(len(paths) - bar.n)  # a search looks at all and answers with the best
    if failed:
        named = ", ".join(failed[:5]) + (" ..." if len(failed) > 5 else "")
        told = f"{len(failed)} of {len(paths)} images failed: {named}"
        print(logs.printable(told), file=sys.stderr)
    return exit_codes.FAILED if failed else exit_codes.DONE


def _answers(reader: Reader, paths: Sequence[str], options: argparse.Namespace) -> Iterator[Answer]:
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
    return predictions.search(reader, paths, options.text, options.top, options.rerank)


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for numbers that can't be."""
    for name, least in _LEAST.items():
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    if options.use != "caption":
        return
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p {options.top_p}: expected a share above 0, at most 1")
    if options.captions > 1 and options.beams == 1 and not options.sample:
        raise ValueError("--captions of greedy search (--beams 1): give --sample or more --beams")


def _decoding(
    options: argparse.Namespace, output: OutputSettings
) -> BeamSettings | NucleusSettings:
    """The checkpoint's settings, with those of the command over them."""
    asked = {
        "max_length": options.max_tokens,
        "min_length": options.min_tokens,
        "num_beams": options.beams,
        "scoring": options.scoring,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    beam = replace(output.beam(), **asked)
    if options.sample:
        return NucleusSettings(
            top_p=options.top_p, max_length=beam.max_length, min_length=beam.min_length
        )
    return beam


def _line(answer: Answer) -> str:
    """JSON, readable in every language. Bytes of a path that are no UTF-8 become the escapes that
    Python's json and os.fsencode turn back into them."""
    text = json.dumps(answer, ensure_ascii=False)
    return logs.printable(text.encode(errors="backslashreplace").decode())


@contextmanager
def _output(options: argparse.Namespace) -> Iterator[Callable[[Answer], None]]:
    """Where answers go: stdout, lines of a file, or the arrays of an .npz. A file takes its place
    at the end; what an ended run had written stays in FILE.partial."""
    out: Path | None = options.out
    if out is None:
        yield lambda answer: print(_line(answer), flush=True)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    if out.suffix == ".npz":
        if options.use != "embed":
            raise ValueError(f"{out}: only features go into an .npz")
        rows: list[Answer] = []
        yield rows.append
        good = [row for row in rows if "error" not in row]
        for row in rows:
            if "error" in row:
                print(_line(row), flush=True)
        with partial.open("wb") as file:
            np.savez(
                file,
                images=np.array([row["image"] for row in good], np.str_),
                features=np.array([row["features"] for row in good], np.float32),
            )
    else:
        with partial.open("w", encoding="utf-8") as lines:
            yield lambda answer: print(_line(answer), file=lines)
    partial.replace(out)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    uses = parser.add_subparsers(dest="use", required=True, metavar="USE")
    shared = _shared_options()

    def use(name: str, text: str) -> Parser:
        return uses.add_parser(name, help=text, description=text, parents=[shared])

    caption = use("caption", "a caption of every image")
    own = "default: the checkpoint's"
    caption.add_argument("--beams", type=int, help=f"width of the beam search; 1 is greedy; {own}")
    caption.add_argument(
        "--scoring", choices=("published", "huggingface"),
        help="length that beam search divides by: as BLIP's figures, or as transformers' generate; "
        "default: published for BLIP's own files, else huggingface",
    )  # fmt: skip
    _add(caption, "--captions", 1, "captions of each image: the best, or with --sample as drawn")
    caption.add_argument("--sample", action="store_true", help="nucleus sampling, no beam search")
    _add(caption, "--top-p", 0.9, "share of the probability that nucleus sampling draws from")
    _add(
        caption,
        "--seed",
        0,
        "seed of nucleus sampling; with the path of an image it fixes the caption",
    )
    caption.add_argument(
        "--max-tokens", type=int,
        help=f"longest caption in tokens, prompt and [SEP] included; {own}",
    )  # fmt: skip
    caption.add_argument(
        "--min-tokens", type=int, help=f"shortest caption in tokens, prompt included; {own}"
    )
    caption.add_argument(
        "--prompt",
        help=f'how captions begin; {own} ("a picture of " for BLIP\'s captioners)',
    )
    vqa = use("vqa", "answers to questions about every image")
    vqa.add_argument(
        "--question", action="append", required=True, help="can be given several times"
    )
    match = use("match", "matching probability (itm) and cosine (itc) of every image and text")
    match.add_argument("--text", action="append", required=True, help="can be given several times")
    use("embed", "features of every image, of norm 1; with --out NAME.npz as arrays")
    search = use("search", "the images that fit a text best")
    search.add_argument("--text", required=True, help="what to look for")
    _add(search, "--top", 10, "number of images to return")
    _add(search, "--rerank", 0, "number of best images to re-rank by matching probability; 0: none")
    return parser


def _shared_options() -> Parser:
    shared = Parser(add_help=False)
    shared.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs")
    shared.add_argument(
        "--model", required=True, type=Path, metavar="CHECKPOINT",
        help="a run's folder, step_N, BLIP's .pth, or a Hugging Face folder",
    )  # fmt: skip
    shared.add_argument("--out", type=Path, metavar="FILE", help="default: stdout")
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
    _add(shared, "--batch-size", 32, "images at once; does not change the answers")
    _add(shared, "--threads", 4, "threads that decode images")
    return shared


def _add(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    parser.add_argument(name, type=type(default), default=default, help=text + " (%(default)s)")
