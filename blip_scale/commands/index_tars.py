"""Index webdataset tars, so that training reads them in place (`format: tars` of a stream).

blip-scale index-tars tars
blip-scale index-tars s3://bucket/tars --shard 0/8
The index is written to TARS/tar-index, or to OUT. If the tars are in a bucket that you can't write
to, OUT is the folder tar-index in the stream's cache (`local`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

from tqdm import tqdm

from blip_scale import logs
from blip_scale.commands.command_line import Parser, check_least, progress_on, refuse, run_command
from blip_scale.commands.prepare_data import add_filters, filters_of
from blip_scale.config import exit_codes
from blip_scale.data.conversion.run import Part
from blip_scale.data.conversion.screening import Rules
from blip_scale.data.conversion.tar_index import IndexJob, write_index
from blip_scale.data.reading.cache import TAR_INDEX
from blip_scale.storage.locations import is_local, join


def main(arguments: Sequence[str] | None = None, prog: str = "index_tars.py") -> int:
    """Run the command, and return its exit code.

    It is 0, 2 for refused input, and 130 or 143 after a signal.
    """
    options = _parser(prog).parse_args(arguments)
    return run_command(prog, lambda: _index(options, prog), "finished tars")


def _index(options: argparse.Namespace, prog: str) -> int:
    check_least(options, {"max_words": 1, "workers": 1})
    out = options.out or join(options.tars, TAR_INDEX)
    rules = Rules("tars", options.max_words, in_place=True, **filters_of(options))
    job = IndexJob(options.tars, out, rules, options.caption_key, options.workers, options.scratch)
    start_s = time.perf_counter()
    with tqdm(desc="index", unit="pair", mininterval=1.0, smoothing=0.05) as bar:
        # Clients of object storage hang in a forked process.
        start_method = "fork" if is_local(options.tars) and is_local(out) else "spawn"
        summary = write_index(job, Part.parse(options.shard), progress_on(bar, "tar"), start_method)
    if summary is None:
        print(f"{out}: part {options.shard} is done; other parts are not done yet")
        return exit_codes.DONE
    pairs, seconds = summary["pairs"], time.perf_counter() - start_s
    print(f"{out}: index of {summary['shards']} tars in {seconds:.0f} s")
    print(
        f"pairs: {pairs['read']} read = {pairs['written']} indexed + {pairs['rejected']} left out"
    )
    for reason, count in summary["rejects"].items():
        print(f"  {reason}: {count}")
    if pairs["written"]:
        return exit_codes.DONE
    rejects = [f"{reason}: {example}" for reason, example in summary["reject_examples"].items()]
    details = logs.printable("; ".join(rejects) or "the tars are empty")
    return refuse(prog, f"{options.tars}: no pair can be indexed ({details})")


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tars", metavar="TARS", help="folder of the tars: a path or s3://b/p")
    parser.add_argument("out", metavar="OUT", nargs="?", help="index; default: TARS/tar-index")
    parser.add_argument("--caption-key", default="", help="key of the caption in the .json")
    parser.add_argument(
        "--max-words", type=int, default=Rules.max_words,
        help="cut captions to this many words (%(default)s)",
    )  # fmt: skip
    add_filters(parser)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)"
    )
    parser.add_argument("--shard", default="0/1", help="index only part i of n: i/n (%(default)s)")
    parser.add_argument("--scratch", help="folder where shards for a remote are made")
    return parser
