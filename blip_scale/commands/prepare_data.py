"""Convert a data set to MDS shards.

blip-scale prepare-data demo data/demo
blip-scale prepare-data folder pictures data/pictures --holdout 2%
blip-scale prepare-data laion laion400m-data s3://bucket/laion --shard 0/64
docs/data.md lists what each SOURCE reads, and leads from a list of URLs to a training run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from blip_scale import logs
from blip_scale.commands.command_line import Parser, check_least, progress_on, refuse, run_command
from blip_scale.config import exit_codes
from blip_scale.data.captions import parse_roles
from blip_scale.data.conversion.holdout import HELDOUT, parse_holdout
from blip_scale.data.conversion.pairs import Reason, Source
from blip_scale.data.conversion.run import Conversion, Part, convert, merge
from blip_scale.data.conversion.screening import PIXEL_LIMIT, Rules
from blip_scale.data.conversion.survey import QUANTILES, Survey, survey
from blip_scale.data.conversion.text_counts import text_lines, tokenizer_of
from blip_scale.data.sources.demo_sets import demo, demo_visdial, easy_nlvr2, easy_vqa
from blip_scale.data.sources.readers import READERS, SourceReader
from blip_scale.storage.free_space import parse_bytes
from blip_scale.storage.locations import is_local, local_path
from blip_scale.storage.output_files import check_apart


@dataclass(frozen=True)
class DemoSet:
    """A data set that `prepare-data` makes from files shipped in Python packages."""

    help: str
    """Description in one line."""
    make: Callable[[argparse.Namespace], str]
    """Function that makes the set in `options.out`, and returns a line for the user."""
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of an argument before OUT -> keyword arguments of argparse's `add_argument`."""


def main(arguments: Sequence[str] | None = None, prog: str = "prepare_data.py") -> int:
    """Run the command, and return its exit code.

    It is 0, 2 for refused input, and 130 or 143 after a signal.
    """
    options = _parser(prog).parse_args(arguments)
    options.prog = prog
    work = _make_demo_set if options.name in DEMO_SETS else _convert
    try:
        return run_command(prog, lambda: work(options), "finished chunks")
    except ModuleNotFoundError as error:
        extra = "[demo]" if options.name in DEMO_SETS else ""
        return refuse(prog, f"{error}; in a clone, run `pip install '.{extra}'`")


def _make_demo_set(options: argparse.Namespace) -> int:
    print(f"{options.out}: {DEMO_SETS[options.name].make(options)}")
    return exit_codes.DONE


def _convert(options: argparse.Namespace) -> int:
    check_least(options, _LEAST)
    if options.merge:
        return _tell_summary(options, merge(options.out, options.scratch), None)
    source = _source(options)
    rules = _rules(options, source)
    reader = READERS[options.name]
    reader_options = {name: getattr(options, name) for name in reader.options}
    chunks = list(reader.chunks(source, **reader_options))
    if not chunks:
        raise ValueError(f"{options.input}: there is nothing to convert in it")
    if options.dry_run:
        return _tell_survey(survey(chunks, rules, options.sample, _tokenizer(options)), options)
    if not options.out:
        raise ValueError("OUT is missing: name a folder or a remote such as s3://b/p")
    check_not_read(options.out, options.input)
    # Clients of object storage and of web servers hang in a forked process.
    places = (options.input, options.images, options.out)
    local = all(map(is_local, places)) and not options.allow_outside
    reading = {"reader": options.name, **asdict(source), **reader_options}
    del reading["location"], reading["scratch"]
    job = Conversion(
        chunks, options.out, rules, parse_bytes(options.shard_size), options.workers,
        options.scratch, "fork" if local else "spawn", None, reading, _tokenizer(options),
    )  # fmt: skip
    start_s = time.perf_counter()
    with tqdm(desc=options.name, unit="pair", mininterval=1.0, smoothing=0.05) as bar:
        summary = convert(
            job, Part.parse(options.shard), progress_on(bar, "chunk"), options.overwrite
        )
    if summary is None:
        print(f"{options.out}: part {options.shard} is done; other parts are not done yet")
        return exit_codes.DONE
    return _tell_summary(options, summary, time.perf_counter() - start_s)


def check_not_read(out: str, source: str) -> None:
    """Refuse an output inside the input folder, because the input is read recursively.

    Raises:
        RefusedInput: the local output is the input folder, or is in it.
    """
    if is_local(out) and is_local(source) and local_path(source).is_dir():
        check_apart(local_path(out), local_path(source), may_contain=True)


def _rules(options: argparse.Namespace, source: Source) -> Rules:
    if source.caption_key:
        parse_roles(source.caption_key)
    if not 0 < options.max_pixels <= PIXEL_LIMIT:
        raise ValueError(
            f"--max-pixels {options.max_pixels}: expected 1 to {PIXEL_LIMIT}, the most that Pillow "
            "opens"
        )
    return Rules(
        source=options.label or options.name,
        max_words=options.max_words,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        max_pixels=options.max_pixels,
        max_side=options.max_side,
        jpeg_quality=options.jpeg_quality,
        raw_captions=options.raw_captions,
        add_sha256=options.sha256,
        holdout=parse_holdout(options.holdout),
        images_below=None if options.allow_outside else source.image_root(),
        **filters_of(options),
    )


def filters_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `Rules` that the options of `add_filters` set.

    Raises:
        ValueError: a value is not allowed.
    """
    limits = {name: getattr(options, name) for name in _LIMITS}
    for name, value in limits.items():
        smallest = -1 if name == "min_similarity" else 0
        if value is not None and not smallest <= value <= 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value}: expected a number from {smallest} to 1")
    return {**limits, "keep_unscored": options.keep_unscored}


def _source(options: argparse.Namespace) -> Source:
    return Source(
        location=options.input,
        images=options.images,
        strip_prefix=options.strip_prefix,
        caption_key=",".join(options.caption_key),
        image_key=options.image_key,
        pairs_per_chunk=options.pairs_per_chunk,
        scratch=options.scratch or "",
    )


def _tell_summary(
    options: argparse.Namespace, summary: dict[str, Any], seconds: float | None
) -> int:
    took = "" if seconds is None else f" in {seconds:.0f} s"
    print(f"{options.out}: {summary['shards']} shards, {_size(summary['bytes'])}{took}")
    for name in ("pairs", "captions"):
        counts = summary[name]
        held_out = f"{counts['held_out']} held out + " if "held_out" in counts else ""
        print(
            f"{name}: {counts['read']} read = {counts['written']} written + {held_out}"
            f"{counts['rejected']} rejected"
        )
    for reason, count in summary["rejects"].items():
        print(f"  {reason}: {count}")
    _tell_roles(options, summary.get("roles", {}))
    _tell_rest(summary.get("tallies", {}), summary["text"], options.max_words)
    if summary["pairs"].get("held_out"):
        print(_heldout_hint(options.out, options.label or options.name))
    if summary["pairs"]["written"]:
        return exit_codes.DONE
    examples = summary["reject_examples"]
    return _refuse_nothing(options, summary["rejects"], examples, summary.get("tallies", {}))


def _heldout_hint(out: str, name: str) -> str:
    """Return the setting with which a recipe uses the held-out set of an output."""
    location = f"{out.rstrip('/')}/{HELDOUT.rstrip('/')}"
    stream = {"name": name, "local": location}
    if not is_local(out):
        stream |= {"local": f"cache/{name}_heldout", "remote": location}
    shown = yaml.safe_dump({"data": {"heldout": [stream]}}, sort_keys=False).rstrip()
    return f"held-out pairs are in {location}; name them in the recipe:\n{shown}"


def _tell_survey(seen: Survey, options: argparse.Namespace) -> int:
    print(f"sample: {seen.read} pairs, {seen.written} of them would be written")
    for reason, count in seen.reasons.most_common():
        print(f"  {reason}: {count} (the first: {logs.printable(seen.examples[reason])})")
    _tell_roles(options, seen.roles)
    _tell_rest(seen.unused, seen.text, options.max_words)
    print(f"{'':<10}" + "".join(f"{f'{100 * q:.0f} %':>8}" for q in QUANTILES))
    for name, values in seen.quantiles().items():
        print(f"{name:<10}" + "".join(f"{value:>8}" for value in values))
    for caption in seen.shown_captions():
        print(f"caption: {logs.printable(caption)}")
    seconds = seen.whole_seconds(options.workers)
    print(
        f"whole: about {seen.whole_pairs} pairs, {_size(seen.whole_bytes)} of shards, "
        f"{seconds / 3600:.2f} h with {options.workers} processes "
        f"({seen.read / max(seen.seconds, 1e-9):.0f} pairs/s each)"
    )
    if seen.written:
        return exit_codes.DONE
    return _refuse_nothing(options, seen.reasons, seen.examples, seen.unused)


def _tell_roles(options: argparse.Namespace, counts: Mapping[str, int]) -> None:
    """Print the number of captions of each role in --caption-key, including roles with none."""
    if options.caption_key:
        named = dict(parse_roles(",".join(options.caption_key)))
        print(f"captions by role: {_list_of({**dict.fromkeys(named, 0), **counts})}")


def _tell_rest(unused: Mapping[str, int], text: Mapping[str, int], max_words: int) -> None:
    if unused:
        print(f"not used: {_list_of(unused)}")
    for line in text_lines(text, max_words):
        print(line)


def _list_of(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {logs.printable(kind)}" for kind, count in sorted(counts.items()))


def _refuse_nothing(
    options: argparse.Namespace,
    reasons: Mapping[str, int],
    examples: Mapping[str, str],
    unused: Mapping[str, int],
) -> int:
    """Refuse a set from which no pair was written. Report the most frequent reason and its fix."""
    if not reasons:
        what = f"nothing to convert is in it, but {_list_of(unused)}" if unused else "it is empty"
        return refuse(options.prog, f"{options.input}: {what}")
    reason = max(reasons, key=lambda name: reasons[name])
    advice = _ADVICE.get(reason, "")
    again = "" if options.dry_run else "; then convert again with --overwrite"
    return refuse(
        options.prog,
        f"{options.input}: no pair can be written; {reason}: {logs.printable(examples[reason])}"
        + (f"; {advice}{again}" if advice else ""),
    )


_LEAST = {"max_words": 1, "max_side": 1, "pairs_per_chunk": 1, "workers": 1, "sample": 1}
"""Option name, with underscores -> smallest value allowed."""
_COLUMNS = "name the columns with --caption-key and --image-key"
_IMAGES = (
    "say where the images lie with --images, and what to take off their paths (--strip-prefix)"
)
_LIMITS = {
    "min_similarity": "reject pairs whose image and text are less similar",
    "max_punsafe": "reject images that are unsafe with a higher probability",
    "max_pwatermark": "reject images that have a watermark with a higher probability",
}
"""Field of `Rules` -> help text of its option."""
_SCORES = (
    "leave the filter out, download with img2dataset's --save_additional_columns, or give "
    "--keep-unscored"
)
_ADVICE: dict[str, str] = {
    Reason.MISSING_IMAGE: _IMAGES,
    Reason.OUTSIDE: _IMAGES,
    Reason.MISSING_CAPTION: _COLUMNS,
    Reason.EMPTY_CAPTION: _COLUMNS,
    Reason.CAPTION_NO_TEXT: _COLUMNS,
    Reason.MISSING_KEY: _COLUMNS,
    Reason.MISSING_SCORE: _SCORES,
}
"""Most frequent reason for rejection -> advice to the user if no pair was written."""


def _tokenizer(options: argparse.Namespace) -> str:
    try:
        tokenizer_of(options.tokenizer)
    except (OSError, ValueError) as error:
        print(f"token counts are left out: {logs.one_line(error)}", file=sys.stderr)
        return ""
    return str(options.tokenizer)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _make_demo(options: argparse.Namespace) -> str:
    start_s = time.perf_counter()
    summary = demo.prepare(options.out, _progress, options.size)
    done = f"made in {time.perf_counter() - start_s:.0f} s"
    if summary["reused"]:
        done = "was there already"
    return f"{done}; pairs: {_counts(summary['pairs'])}"


def _progress(items: Iterable, total: int) -> Iterable:
    return tqdm(items, total=total, desc="rendering", unit="picture", mininterval=1.0)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


DEMO_SETS: dict[str, DemoSet] = {
    "demo": DemoSet(
        "emoji drawings and icons that Python packages ship",
        _make_demo,
        {
            "--size": {
                "type": int,
                "default": demo.IMAGE_SIZE,
                "help": "side of the pictures in pixels (%(default)s)",
            }
        },
    ),
    "easy_vqa": DemoSet(
        "drawings with questions that the package easy-vqa ships",
        lambda options: f"questions: {_counts(easy_vqa.prepare(options.out))}",
    ),
    "easy_nlvr2": DemoSet(
        "sentences about pairs of the drawings that the package easy-vqa ships",
        lambda options: f"pairs: {_counts(easy_nlvr2.prepare(options.out))}",
    ),
    "demo_visdial": DemoSet(
        "VisDial sets from the drawings of the demo set",
        lambda options: f"drawings: {_counts(demo_visdial.prepare(options.demo, options.out))}",
        {"demo": {"type": Path, "metavar": "DEMO", "help": "folder of the demo set: data/demo"}},
    ),
}
"""Name on the command line -> demo set. To add a demo set, add an entry here."""


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="name", required=True, metavar="SOURCE")
    for name, demo_set in DEMO_SETS.items():
        command = sources.add_parser(name, help=demo_set.help, description=demo_set.help)
        for argument, keywords in demo_set.arguments.items():
            command.add_argument(argument, **keywords)
        command.add_argument(
            "out", type=Path, metavar="OUT", help=f"folder to make, e.g. data/{name}"
        )
    for name, reader in READERS.items():
        command = sources.add_parser(name, help=reader.help, description=reader.help)
        _add_reader_options(command, reader)
    return parser


def add_filters(group: argparse._ActionsContainer) -> None:
    """Add the options that filter pairs by the scores stored in their data set."""
    for name, text in _LIMITS.items():
        option = name.replace("_", "-")
        group.add_argument(f"--{option}", type=float, help=f"{text}, by the scores of the set")
    group.add_argument(
        "--keep-unscored", action="store_true",
        help="accept pairs without the score of such a filter; default: reject them",
    )  # fmt: skip


def _add_reader_options(command: argparse.ArgumentParser, reader: SourceReader) -> None:
    command.add_argument(
        "input",
        metavar="IN",
        help="folder or file: a path, s3://b/p, gs://, az://, or https:// for a file",
    )
    command.add_argument("out", metavar="OUT", nargs="?", help="folder, or a remote: s3://b/p")
    rules = Rules(source="")
    reading = command.add_argument_group("reading")
    writing = command.add_argument_group("accepting and writing")
    running = command.add_argument_group("running")

    def add(group: argparse._ArgumentGroup, name: str, default: Any, text: str) -> None:
        kind = int if default is None else type(default)
        shown = "" if default in (None, "") else " (%(default)s)"
        group.add_argument(name, type=kind, default=default, help=text + shown)

    for name, text in reader.options.items():
        add(reading, f"--{name.replace('_', '-')}", "", text)
    add(reading, "--images", "", "folder that relative image paths of annotations start from")
    reading.add_argument(
        "--allow-outside", action="store_true",
        help="open all paths and URLs that a list names, not only those below --images (or IN)",
    )  # fmt: skip
    add(reading, "--strip-prefix", "", "remove this from the front of these paths first")
    reading.add_argument(
        "--caption-key", action="append", default=[], metavar="KEY,ROLE=KEY,...",
        help="keys or columns of captions, stored with the key as their role, or with ROLE; may be "
        "repeated",
    )  # fmt: skip
    add(reading, "--image-key", "", "key or column of the image, if it has an unusual name")
    add(reading, "--pairs-per-chunk", Source("").pairs_per_chunk,
        "pairs that one process converts at a time, of lists and folders")  # fmt: skip
    add(writing, "--label", "", "`source` of the records; default: SOURCE")
    add(writing, "--min-side", rules.min_side, "reject images with a shorter side, in pixels")
    add(writing, "--max-aspect", rules.max_aspect,
        "reject images whose longer side is more than this many times the shorter")  # fmt: skip
    add(writing, "--max-pixels", rules.max_pixels, "reject larger images without decoding them")
    add_filters(writing)
    add(writing, "--max-side", None,
        "scale images down to this shorter side; default: keep the bytes")  # fmt: skip
    add(writing, "--jpeg-quality", rules.jpeg_quality, "JPEG quality of scaled images")
    add(writing, "--max-words", reader.max_words, "cut captions to this many words")
    writing.add_argument(
        "--raw-captions", action="store_true",
        help="keep captions whole, with case and punctuation; training cleans and cuts them",
    )  # fmt: skip
    writing.add_argument(
        "--sha256", action="store_true", help="compute the SHA-256 of images that have none"
    )
    add(
        writing,
        "--holdout",
        "",
        "hold out this many pairs (5000), or a share of them (2%%), as a second set in OUT/heldout",
    )
    add(writing, "--shard-size", "64mb", "largest size of a shard")
    add(running, "--workers", os.cpu_count() or 1, "processes")
    add(running, "--shard", "0/1", "convert only part i of n, from 0/n to n-1/n")
    running.add_argument("--merge", action="store_true", help="only merge the finished parts")
    running.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what an earlier conversion left in OUT",
    )
    running.add_argument("--dry-run", action="store_true", help="read a sample, write nothing")
    add(running, "--sample", 1000, "pairs that a dry run reads")
    add(
        running,
        "--tokenizer",
        demo.TEXT_CHECKPOINT,
        "tokenizer that counts tokens for the summary",
    )
    running.add_argument(
        "--scratch",
        help="folder for temporary files, as shards for a remote (default: the system's)",
    )
