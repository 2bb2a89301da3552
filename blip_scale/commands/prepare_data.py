"""Prepare a data set as MDS shards.

python tools/prepare_data.py demo data/demo
python tools/prepare_data.py laion laion400m-data s3://bucket/laion --shard 0/64
docs/data.md tells what each SOURCE reads, and goes from a list of URLs to a training run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from blip_scale.config import exit_codes
from blip_scale.config.recipe import TextRecipe
from blip_scale.data.conversion.pairs import Chunk, Source
from blip_scale.data.conversion.run import Conversion, Part, Progress, convert, merge
from blip_scale.data.conversion.screening import PIXEL_LIMIT, Rules
from blip_scale.data.conversion.survey import QUANTILES, Survey, survey
from blip_scale.data.sources.demo_sets import demo, demo_visdial, easy_nlvr2, easy_vqa
from blip_scale.data.sources.readers import READERS
from blip_scale.data.tokenizer import load_tokenizer
from blip_scale.storage.free_space import parse_bytes
from blip_scale.storage.locations import is_local

_HELP = {
    "coco": "dataset_coco.json (Karpathy), or BLIP's coco_karpathy_*.json",
    "visual_genome": "folder with region_descriptions.json and image_data.json, or vg_caption.json",
    "conceptual_captions": "CC3M or CC12M as img2dataset wrote it",
    "sbu": "SBU captions as img2dataset wrote them",
    "laion": "LAION as img2dataset wrote it: tars, parquet or files",
    "blip_json": "JSON lists of {image or url, caption}",
    "folder": "images with captions.csv, captions.jsonl or a .txt beside each",
    "webdataset": "tars of NAME.jpg, NAME.txt, NAME.json",
    "vqa": "BLIP's vqa_*.json and vg_qa.json: {question, answer, image}",
    "nlvr2": "BLIP's nlvr_*.json: {images, sentence, label}",
    "visdial": "visdial_1.0_*.json: dialogs with 100 candidates an answer",
}
_MAX_WORDS = {"vqa": 50, "visdial": 50, "nlvr2": 40}
"""As published, where it isn't the 30 of captions."""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit code: 0, 2 for refused input, 130 or 143 when stopped by a signal."""
    options = _parser(prog).parse_args(arguments)
    try:
        if options.name in ("easy_vqa", "easy_nlvr2", "demo_visdial"):
            return _make_small_tasks(options)
        return _make_demo(options) if options.name == "demo" else _convert(options)
    except ModuleNotFoundError as error:
        is_demo = options.name in ("demo", "easy_vqa", "easy_nlvr2")
        mend = "requirements-demo.txt" if is_demo else "requirements.txt"
        print(f"error: {error}; run `pip install -r {mend}`", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        number = int(str(stop) or signal.SIGINT)
        print("stopped; finished chunks are kept, the same command goes on", file=sys.stderr)
        return exit_codes.of_signal(number)
    return exit_codes.REFUSED


def _convert(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _stop)
    if options.merge:
        _print_summary(options.out, merge(options.out, options.scratch), None)
        return 0
    rules = _rules(options)
    chunks = _chunks(options)
    if options.dry_run:
        _print_survey(survey(chunks, rules, options.sample, _token_counter(options)), options)
        return 0
    if not options.out:
        raise ValueError("say where the shards go: OUT is a folder or a remote such as s3://b/p")
    local = is_local(options.input) and is_local(options.images)
    job = Conversion(
        chunks, options.out, rules, parse_bytes(options.shard_size), options.workers,
        options.scratch, "fork" if local else "spawn",
    )  # fmt: skip
    start_s = time.perf_counter()
    with tqdm(desc=options.name, unit="pair", mininterval=1.0, smoothing=0.05) as bar:
        summary = convert(job, Part.parse(options.shard), _shower(bar))
    if summary is None:
        print(f"{options.out}: part {options.shard} is done; other parts are not yet")
    else:
        _print_summary(options.out, summary, time.perf_counter() - start_s)
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _rules(options: argparse.Namespace) -> Rules:
    if not 0 < options.max_pixels <= PIXEL_LIMIT:
        raise ValueError(f"--max-pixels: from 1 to {PIXEL_LIMIT}, which is all that Pillow opens")
    return Rules(
        source=options.label or options.name,
        max_words=options.max_words or _MAX_WORDS.get(options.name, Rules.max_words),
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        max_pixels=options.max_pixels,
        max_side=options.max_side,
        jpeg_quality=options.jpeg_quality,
    )


def _chunks(options: argparse.Namespace) -> list[Chunk]:
    source = Source(
        location=options.input,
        images=options.images,
        strip_prefix=options.strip_prefix,
        split=options.split,
        caption_key=options.caption_key,
        relevance=options.relevance,
        pairs_per_chunk=options.pairs_per_chunk,
    )
    return list(READERS[options.name](source))


def _shower(bar: tqdm) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        bar.total = progress.pairs
        share = progress.rejected / max(1, progress.read)
        bar.set_postfix_str(
            f"{share:.1%} rejected, chunk {progress.chunks_done}/{progress.chunks}", refresh=False
        )
        bar.update(progress.read - bar.n)

    return show


def _print_summary(out: str, summary: dict[str, Any], seconds: float | None) -> None:
    took = "" if seconds is None else f" in {seconds:.0f} s"
    print(f"{out}: {summary['shards']} shards, {_size(summary['bytes'])}{took}")
    for name in ("pairs", "captions"):
        counts = summary[name]
        print(
            f"{name}: {counts['read']} read = {counts['written']} written + "
            f"{counts['rejected']} rejected"
        )
    for reason, count in summary["rejects"].items():
        print(f"  {reason}: {count}")


def _print_survey(found: Survey, options: argparse.Namespace) -> None:
    print(f"sample: {found.read} pairs, {found.written} of them would be written")
    for reason, count in found.reasons.most_common():
        print(f"  {reason}: {count}")
    print(f"{'':<10}" + "".join(f"{f'{100 * q:.0f} %':>8}" for q in QUANTILES))
    for name, values in found.quantiles().items():
        print(f"{name:<10}" + "".join(f"{value:>8}" for value in values))
    seconds = found.whole_seconds(options.workers)
    print(
        f"whole: about {found.whole_pairs} pairs, {_size(found.whole_bytes)} of shards, "
        f"{seconds / 3600:.2f} h with {options.workers} processes "
        f"({found.read / max(found.seconds, 1e-9):.0f} pairs/s each)"
    )


def _token_counter(options: argparse.Namespace) -> Callable[[str], int] | None:
    try:
        tokenizer = load_tokenizer(TextRecipe(checkpoint=None, tokenizer=options.tokenizer))
    except (OSError, ValueError) as error:
        print(f"token lengths are left out: {error}", file=sys.stderr)
        return None
    return lambda caption: len(tokenizer(caption)["input_ids"])


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _make_demo(options: argparse.Namespace) -> int:
    start_s = time.perf_counter()
    summary = demo.prepare(options.out, _progress, options.size)
    counts = ", ".join(f"{name} {count}" for name, count in summary["pairs"].items())
    done = (
        "was there already"
        if summary["reused"]
        else f"made in {time.perf_counter() - start_s:.0f} s"
    )
    print(f"{options.out}: {done}; pairs: {counts}")
    return 0


def _make_small_tasks(options: argparse.Namespace) -> int:
    if options.name == "easy_vqa":
        kind, counts = "questions", easy_vqa.prepare(options.out)
    elif options.name == "easy_nlvr2":
        kind, counts = "pairs", easy_nlvr2.prepare(options.out)
    else:
        kind, counts = "drawings", demo_visdial.prepare(options.demo, options.out)
    print(f"{options.out}: {kind}: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    return 0


def _progress(items: Iterable, total: int) -> Iterable:
    return tqdm(items, total=total, desc="rendering", unit="picture", mininterval=1.0)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="name", required=True, metavar="SOURCE")
    parser_demo = sources.add_parser(
        "demo", help="emoji drawings and icons that Python packages ship"
    )
    parser_demo.add_argument("out", type=Path, metavar="OUT", help="folder to make, e.g. data/demo")
    parser_demo.add_argument(
        "--size",
        type=int,
        default=demo.IMAGE_SIZE,
        help="side of the pictures in pixels (%(default)s)",
    )
    parser_vqa = sources.add_parser(
        "easy_vqa", help="drawings with questions that the package easy-vqa ships"
    )
    parser_vqa.add_argument("out", type=Path, metavar="OUT", help="folder to make: data/easy_vqa")
    parser_pairs = sources.add_parser(
        "easy_nlvr2", help="sentences about pairs of the drawings that the package easy-vqa ships"
    )
    parser_pairs.add_argument(
        "out", type=Path, metavar="OUT", help="folder to make: data/easy_nlvr2"
    )
    parser_tasks = sources.add_parser("demo_visdial", help="VisDial sets from the demo's drawings")
    parser_tasks.add_argument("demo", type=Path, metavar="DEMO", help="made before: data/demo")
    parser_tasks.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    shared = _shared_options()
    for name in READERS:
        sources.add_parser(name, help=_HELP[name], description=_HELP[name], parents=[shared])
    return parser


def _shared_options() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "input",
        metavar="IN",
        help="folder or file: a path, s3://b/p, gs://, az://, or https:// for a file",
    )
    shared.add_argument("out", metavar="OUT", nargs="?", help="folder, or a remote: s3://b/p")
    rules = Rules(source="")
    reading = shared.add_argument_group("reading")
    writing = shared.add_argument_group("accepting and writing")
    running = shared.add_argument_group("running")

    def add(group: argparse._ArgumentGroup, name: str, default: Any, text: str) -> None:
        kind = int if default is None else type(default)
        shown = "" if default in (None, "") else " (%(default)s)"
        group.add_argument(name, type=kind, default=default, help=text + shown)

    source = Source("")
    add(reading, "--images", "", "folder that the image paths of annotations start from")
    add(reading, "--strip-prefix", "", "what to remove from these paths first")
    add(reading, "--split", "", "part of dataset_coco.json: train (with restval), val, test")
    add(reading, "--caption-key", "", "key or column of the caption, where it is an unusual one")
    add(reading, "--relevance", "", "visdial: visdial_1.0_val_dense_annotations.json")
    add(reading, "--pairs-per-chunk", source.pairs_per_chunk, "unit of work of lists and folders")
    add(writing, "--label", "", "the records' source; default: SOURCE")
    add(writing, "--min-side", rules.min_side, "reject images with a shorter side below, pixels")
    add(writing, "--max-aspect", rules.max_aspect, "reject images longer than so many widths")
    add(writing, "--max-pixels", rules.max_pixels, "reject larger images without decoding them")
    add(writing, "--max-side", None, "scale shorter sides down to it; default: keep all bytes")
    add(writing, "--jpeg-quality", rules.jpeg_quality, "of what is encoded anew")
    add(writing, "--max-words", None, "cut captions to so many words (30; questions 50, nlvr2 40)")
    add(writing, "--shard-size", "64mb", "largest size of a shard")
    add(running, "--workers", os.cpu_count() or 1, "processes")
    add(running, "--shard", "0/1", "convert part i of n alone, from 0/n to n-1/n")
    running.add_argument("--merge", action="store_true", help="only merge the finished parts")
    running.add_argument("--dry-run", action="store_true", help="look at a sample, write nothing")
    add(running, "--sample", 1000, "pairs of a dry run")
    add(running, "--tokenizer", demo.TEXT_CHECKPOINT, "counts the tokens of a dry run")
    running.add_argument(
        "--scratch", help="where shards are made for a remote (system's temporary folder)"
    )
    return shared
